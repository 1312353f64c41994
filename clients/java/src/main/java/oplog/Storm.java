package oplog;

import java.io.IOException;
import java.util.List;
import java.util.Set;
import java.util.concurrent.TimeUnit;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStatusCode;
import org.apache.arrow.flight.Location;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.Schema;

/** Makes appends 0 to count - 1 of one row each, exactly once, however often the server goes away meanwhile. */
final class Storm {
  private static final int UNACKNOWLEDGED_MAX = 64;
  private static final long PATIENCE_NANOS = TimeUnit.SECONDS.toNanos(60);
  private static final long BACKOFF_MIN_MS = 50;
  private static final long BACKOFF_MAX_MS = 2000;
  private static final Schema SCHEMA = new Schema(List.of(Field.nullable("n", new ArrowType.Int(64, true))));
  // gRPC reports a connection that broke as any of these, depending on where it was in the call.
  private static final Set<FlightStatusCode> TRANSIENT =
      Set.of(FlightStatusCode.UNAVAILABLE, FlightStatusCode.CANCELLED, FlightStatusCode.INTERNAL, FlightStatusCode.UNKNOWN);

  private final BufferAllocator allocator;
  private final Location location;
  private final long count;
  private long next; // the first append that has no receipt
  private long progressed = System.nanoTime();

  Storm(BufferAllocator allocator, Location location, long count) {
    this.allocator = allocator;
    this.location = location;
    this.count = count;
  }

  void run() throws Exception {
    long backoff = BACKOFF_MIN_MS;
    while (next < count) {
      long before = next;
      try {
        sendTheRest();
      } catch (FlightRuntimeException | IOException | Producer.Refused error) {
        if (!isTransient(error) || patienceLeft() <= 0) {
          throw error;
        }
        backoff = next > before ? BACKOFF_MIN_MS : Math.min(2 * backoff, BACKOFF_MAX_MS);
        System.err.printf("append %d: %s; trying again in %d ms%n", next, error.getMessage(), backoff);
        Thread.sleep(backoff);
      }
    }
  }

  /**
   * Sends appends from {@code next} on over a connection of its own. What it leaves without a receipt is sent again by
   * the next call, with the same sequence numbers: that is all exactly-once takes.
   */
  private void sendTheRest() throws Exception {
    try (FlightClient client = Login.connect(allocator, location);
        VectorSchemaRoot root = VectorSchemaRoot.create(SCHEMA, allocator);
        Producer producer = new Producer(client, allocator, "storm", "storm", root)) {
      long sent = next;
      while (next < count) {
        for (; sent < count && sent - next < UNACKNOWLEDGED_MAX; sent++) {
          fill(root, sent);
          producer.send(sent, patienceLeft());
        }
        var receipt = producer.receive(patienceLeft());
        if (receipt.sequence() != next) {
          throw new IllegalStateException("the receipt of append %d came where that of %d was due".formatted(receipt.sequence(), next));
        }
        next++;
        progressed = System.nanoTime();
      }
      producer.done();
      producer.end();
    }
  }

  private static void fill(VectorSchemaRoot root, long n) {
    root.allocateNew(); // new memory: gRPC may not have written the batch before yet
    ((BigIntVector) root.getVector("n")).setSafe(0, n);
    root.setRowCount(1);
  }

  private long patienceLeft() {
    return progressed + PATIENCE_NANOS - System.nanoTime();
  }

  private static boolean isTransient(Exception error) {
    if (error instanceof Producer.Refused refused) {
      return Set.of("UNAVAILABLE", "CANCELLED").contains(refused.answer.status());
    }
    return !(error instanceof FlightRuntimeException flight) || TRANSIENT.contains(flight.status().code());
  }
}

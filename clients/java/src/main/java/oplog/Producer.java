package oplog;

import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.annotation.JsonProperty;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import org.apache.arrow.flight.CallStatus;
import org.apache.arrow.flight.FlightCallHeaders;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.HeaderCallOption;
import org.apache.arrow.flight.PutResult;
import org.apache.arrow.flight.SyncPutListener;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.vector.VectorSchemaRoot;

/** Writes appends to one topic on one DoPut stream; each batch is an append of its own. */
final class Producer implements AutoCloseable {
  static final ObjectMapper JSON = new ObjectMapper();

  private final BufferAllocator allocator;
  private final SyncPutListener receipts = new SyncPutListener();
  private final FlightClient.ClientStreamListener stream;

  /** The server's answer to one append: where its entries are. */
  @JsonIgnoreProperties(ignoreUnknown = true)
  record Receipt(
      String topic,
      @JsonProperty("first_offset") Long firstOffset, // null for a duplicate whose original place is no longer known
      long entries,
      long sequence,
      boolean duplicate,
      String status, // null unless the append was refused
      String error) {

    String place() {
      return firstOffset == null ? "offsets unknown" : "offsets %d to %d".formatted(firstOffset, firstOffset + entries - 1);
    }
  }

  /** An append that the server did not take. What comes after it on the stream is refused too. */
  static final class Refused extends Exception {
    final Receipt answer;

    Refused(Receipt answer) {
      super(answer.status() + ": " + answer.error());
      this.answer = answer;
    }
  }

  /** Opens the stream; every append is what {@code root} holds when it is sent. */
  Producer(FlightClient client, BufferAllocator allocator, String topic, String name, VectorSchemaRoot root) {
    this.allocator = allocator;
    var headers = new FlightCallHeaders();
    headers.insert("oplog-producer", name);
    stream = client.startPut(FlightDescriptor.path(topic), root, receipts, new HeaderCallOption(headers));
  }

  /** Sends one append and does not wait for its receipt. When the stream is broken, {@link #receive} says why. */
  void send(long sequence, long patienceNanos) throws IOException, InterruptedException {
    // putNext waits too, but it spins, and forever when a server that took the connection says nothing.
    long deadline = System.nanoTime() + patienceNanos;
    while (!stream.isReady() && !receipts.isCancelled()) {
      if (System.nanoTime() > deadline) {
        throw new IOException("the server takes no data");
      }
      Thread.sleep(1);
    }
    byte[] words = "{\"sequence\": %d}".formatted(sequence).getBytes(StandardCharsets.UTF_8);
    ArrowBuf metadata = allocator.buffer(words.length);
    metadata.writeBytes(words);
    stream.putNext(metadata); // takes the buffer over
  }

  /** Says that nothing more is sent. Receipts that are under way can still be received. */
  void done() {
    stream.completed();
  }

  /** Returns the next receipt; receipts come in the order of the appends. */
  Receipt receive(long patienceNanos) throws IOException, InterruptedException, Refused {
    try (PutResult result = receipts.poll(patienceNanos, TimeUnit.NANOSECONDS)) {
      if (result == null) {
        throw new IOException(receipts.isCancelled() ? "the server ended the stream" : "no receipt came");
      }
      ArrowBuf metadata = result.getApplicationMetadata();
      byte[] words = new byte[(int) metadata.readableBytes()];
      metadata.readBytes(words);
      Receipt receipt = JSON.readValue(words, Receipt.class);
      if (receipt.status() != null) {
        throw new Refused(receipt);
      }
      return receipt;
    } catch (ExecutionException error) {
      if (error.getCause() instanceof FlightRuntimeException cause) {
        throw cause;
      }
      throw new IOException(error);
    }
  }

  /** Waits for the server's word on the stream as a whole, after the last receipt. */
  void end() {
    stream.getResult();
  }

  @Override
  public void close() {
    if (!receipts.isCancelled()) {
      stream.error(CallStatus.CANCELLED.toRuntimeException()); // otherwise closing the client waits for the call
    }
    receipts.close();
  }
}

package oplog;

import java.io.IOException;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.Arrays;
import java.util.List;
import java.util.function.ObjIntConsumer;
import java.util.regex.Pattern;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightEndpoint;
import org.apache.arrow.flight.FlightInfo;
import org.apache.arrow.flight.FlightRuntimeException;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.flight.Location;
import org.apache.arrow.flight.Ticket;
import org.apache.arrow.flight.sql.FlightSqlClient;
import org.apache.arrow.flight.sql.FlightSqlClient.ExecuteIngestOptions;
import org.apache.arrow.flight.sql.impl.FlightSql.CommandStatementIngest.TableDefinitionOptions;
import org.apache.arrow.flight.sql.impl.FlightSql.CommandStatementIngest.TableDefinitionOptions.TableExistsOption;
import org.apache.arrow.flight.sql.impl.FlightSql.CommandStatementIngest.TableDefinitionOptions.TableNotExistOption;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.Float8Vector;
import org.apache.arrow.vector.TimeStampMicroTZVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.ipc.ArrowReader;
import org.apache.arrow.vector.types.FloatingPointPrecision;
import org.apache.arrow.vector.types.TimeUnit;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.Schema;

/** A client of flight_oplog: produce exactly once, ingest in bulk, ask with parameters, follow. */
public final class Main {
  private static final ArrowType INT64 = new ArrowType.Int(64, true);
  private static final ArrowType FLOAT64 = new ArrowType.FloatingPoint(FloatingPointPrecision.DOUBLE);
  private static final Instant EPOCH = Instant.parse("2026-01-01T00:00:00Z");
  private static final Schema ORDERS =
      new Schema(
          List.of(
              Field.nullable("id", INT64),
              Field.nullable("customer", ArrowType.Utf8.INSTANCE),
              Field.nullable("amount", FLOAT64),
              Field.nullable("placed", new ArrowType.Timestamp(TimeUnit.MICROSECOND, "UTC"))));
  private static final Schema PARAMETERS =
      new Schema(List.of(Field.nullable("1", FLOAT64), Field.nullable("2", ArrowType.Utf8.INSTANCE)));
  private static final long PATIENCE_NANOS = java.util.concurrent.TimeUnit.SECONDS.toNanos(60);

  private final BufferAllocator allocator;
  private final FlightClient client;

  private Main(BufferAllocator allocator, FlightClient client) {
    this.allocator = allocator;
    this.client = client;
  }

  public static void main(String[] arguments) throws Exception {
    boolean isStorm = arguments.length == 3 && arguments[1].equals("storm");
    if (arguments.length == 2 && arguments[1].equals("jdbc")) {
      Jdbc.run(URI.create(arguments[0]));
      return;
    }
    if (arguments.length > 2 && arguments[1].equals("secured")) {
      Secured.run(URI.create(arguments[0]), Arrays.stream(arguments).skip(2).map(Path::of).toList());
      return;
    }
    if (arguments.length != 1 && !isStorm) {
      System.err.println("usage: run URI | run URI storm N | run URI jdbc | run URI secured FILE...");
      System.exit(2);
    }
    var location = new Location(arguments[0]);
    try (BufferAllocator allocator = new RootAllocator()) {
      if (isStorm) {
        long count = Long.parseLong(arguments[2]);
        new Storm(allocator, location, count).run();
        System.out.printf("storm: %d appends acknowledged%n", count);
        return;
      }
      try (FlightClient client = Login.connect(allocator, location)) {
        var tour = new Main(allocator, client);
        tour.produceOrders();
        tour.askSql();
        tour.tailOrders();
      }
    }
  }

  /** Makes three appends exactly once, and shows what the server says to a repetition and to a gap. */
  private void produceOrders() throws Exception {
    try (VectorSchemaRoot root = VectorSchemaRoot.create(ORDERS, allocator)) {
      try (Producer producer = new Producer(client, allocator, "orders", "till-1", root)) {
        for (int k = 0; k < 3; k++) { // all are under way before the first receipt is read
          fillOrders(root, k);
          producer.send(k, PATIENCE_NANOS);
        }
        producer.done();
        for (int k = 0; k < 3; k++) {
          System.out.printf("append %d: %s%n", k, producer.receive(PATIENCE_NANOS).place());
        }
        producer.end();
      }

      // As after a crash: whoever does not know whether an append arrived sends it again.
      try (Producer producer = new Producer(client, allocator, "orders", "till-1", root)) {
        fillOrders(root, 1);
        producer.send(1, PATIENCE_NANOS);
        fillOrders(root, 7);
        producer.send(7, PATIENCE_NANOS); // 3 is due
        producer.done();
        var again = producer.receive(PATIENCE_NANOS);
        System.out.printf("append 1 again: %s, %s%n", again.duplicate() ? "duplicate" : "new", again.place());
        showRefusal(producer);
      }
    }
  }

  private static void showRefusal(Producer producer) throws Exception {
    try {
      producer.receive(PATIENCE_NANOS);
      throw new IllegalStateException("append 7 was not refused");
    } catch (Producer.Refused refused) {
      var expected = Pattern.compile("expected (\\d+)").matcher(refused.answer.error());
      if (!expected.find()) {
        throw refused;
      }
      System.out.printf("append 7: refused, expected %s%n", expected.group(1));
    }
    try {
      producer.end();
      throw new IllegalStateException("the stream of a refused append ended well");
    } catch (FlightRuntimeException expected) {
      // A refused append ends its stream: whatever followed it would leave a gap.
    }
  }

  /** Fills in append k: two orders. */
  private static void fillOrders(VectorSchemaRoot root, int k) {
    root.allocateNew(); // new memory: gRPC may not have written the batch before yet
    String[] customers = {"ada", "grace"};
    double[] amounts = {10.0 * k + 0.5, 20.0 * k + 0.25};
    for (int row = 0; row < 2; row++) {
      long id = 2L * k + row;
      ((BigIntVector) root.getVector("id")).setSafe(row, id);
      ((VarCharVector) root.getVector("customer")).setSafe(row, customers[row].getBytes(StandardCharsets.UTF_8));
      ((Float8Vector) root.getVector("amount")).setSafe(row, amounts[row]);
      Instant placed = EPOCH.plus(id, ChronoUnit.MINUTES);
      ((TimeStampMicroTZVector) root.getVector("placed")).setSafe(row, ChronoUnit.MICROS.between(Instant.EPOCH, placed));
    }
    root.setRowCount(2);
  }

  /** Uses the log as a database. */
  private void askSql() throws Exception {
    var sql = new FlightSqlClient(client); // not closed: it would close the client
    var create =
        TableDefinitionOptions.newBuilder()
            .setIfNotExist(TableNotExistOption.TABLE_NOT_EXIST_OPTION_CREATE)
            .setIfExists(TableExistsOption.TABLE_EXISTS_OPTION_FAIL)
            .build();
    try (var readings = new Readings(allocator)) {
      long entries = sql.executeIngest(readings, new ExecuteIngestOptions("readings", create, null, null, null));
      System.out.printf("ingest: %d entries%n", entries);
    }

    show(
        sql.execute("SELECT count(*) AS n, max(value) AS top FROM readings"),
        (rows, i) -> {
          var n = (BigIntVector) rows.getVector("n");
          var top = (Float8Vector) rows.getVector("top");
          System.out.printf("readings: %d, top %.2f%n", n.get(i), top.get(i));
        });

    String totals =
        """
        SELECT customer, count(*) AS n, sum(amount) AS total FROM orders
        WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer
        """;
    try (var statement = sql.prepare(totals)) {
      VectorSchemaRoot parameters = VectorSchemaRoot.create(PARAMETERS, allocator);
      statement.setParameters(parameters); // closed with the statement
      ((Float8Vector) parameters.getVector(0)).setSafe(0, 0.4);
      ((VarCharVector) parameters.getVector(1)).setSafe(0, "nobody".getBytes(StandardCharsets.UTF_8));
      parameters.setRowCount(1);
      show(
          statement.execute(),
          (rows, i) -> {
            var n = (BigIntVector) rows.getVector("n");
            var total = (Float8Vector) rows.getVector("total");
            System.out.printf("%s: %d orders, %.2f%n", rows.getVector("customer").getObject(i), n.get(i), total.get(i));
          });
    }
  }

  /** Fetches a result and shows each of its rows. */
  private void show(FlightInfo info, ObjIntConsumer<VectorSchemaRoot> row) throws Exception {
    for (FlightEndpoint endpoint : info.getEndpoints()) {
      try (FlightStream stream = client.getStream(endpoint.getTicket())) {
        while (stream.next()) {
          for (int i = 0; i < stream.getRoot().getRowCount(); i++) {
            row.accept(stream.getRoot(), i);
          }
        }
      }
    }
  }

  /** Follows the topic from offset 4 until it has seen two entries. */
  private void tailOrders() throws Exception {
    byte[] ticket = "{\"topic\": \"orders\", \"from\": 4, \"follow\": true}".getBytes(StandardCharsets.UTF_8);
    try (FlightStream stream = client.getStream(new Ticket(ticket))) {
      long nextOffset = 4; // where to come back after a break
      for (int seen = 0; seen < 2 && stream.next(); ) {
        VectorSchemaRoot rows = stream.getRoot(); // may be empty: a quiet topic says that it is alive
        for (int i = 0; i < rows.getRowCount(); i++, seen++) {
          var id = (BigIntVector) rows.getVector("id");
          var amount = (Float8Vector) rows.getVector("amount");
          System.out.printf("tail: %d %s %.2f%n", id.get(i), rows.getVector("customer").getObject(i), amount.get(i));
        }
        ArrowBuf metadata = stream.getLatestMetadata();
        if (metadata != null) { // a batch without goes on in the next
          byte[] words = new byte[(int) metadata.readableBytes()];
          metadata.getBytes(0, words);
          nextOffset = Producer.JSON.readTree(words).get("next_offset").asLong();
        }
      }
      stream.cancel("seen enough", null); // a follower never ends by itself
      System.out.printf("tail: next offset %d%n", nextOffset);
    }
  }

  /** Ten thousand readings as a stream of batches, each made when it is sent. */
  private static final class Readings extends ArrowReader {
    private static final int COUNT = 10_000;
    private static final int BATCH_ROWS = 2_500;
    private int next;

    Readings(BufferAllocator allocator) {
      super(allocator);
    }

    @Override
    protected Schema readSchema() {
      return new Schema(List.of(Field.nullable("id", INT64), Field.nullable("value", FLOAT64)));
    }

    @Override
    public boolean loadNextBatch() throws IOException {
      if (next == COUNT) {
        return false;
      }
      VectorSchemaRoot root = getVectorSchemaRoot();
      root.allocateNew();
      for (int row = 0; row < BATCH_ROWS; row++, next++) {
        ((BigIntVector) root.getVector("id")).setSafe(row, next);
        ((Float8Vector) root.getVector("value")).setSafe(row, next / 4.0);
      }
      root.setRowCount(BATCH_ROWS);
      return true;
    }

    @Override
    public long bytesRead() {
      return 0; // it reads nothing
    }

    @Override
    protected void closeReadSource() {}
  }
}

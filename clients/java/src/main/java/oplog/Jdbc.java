package oplog;

import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.net.URI;
import java.sql.Connection;
import java.sql.DatabaseMetaData;
import java.sql.DriverManager;
import java.sql.JDBCType;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.ResultSetMetaData;
import java.sql.SQLException;
import java.sql.Statement;
import java.time.Duration;
import java.time.OffsetDateTime;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.logging.Level;
import java.util.logging.Logger;

/** The log as JDBC tools see it, through the Flight SQL JDBC driver. Needs a fresh log, as it creates a table. */
final class Jdbc {
  private static final int ROWS = 100;
  // The driver tells how it was built; kept here, as a logger that nobody holds forgets its level.
  private static final Logger DRIVER_LOG = Logger.getLogger("org.apache.arrow.driver.jdbc");

  private final Connection connection;

  private Jdbc(Connection connection) {
    this.connection = connection;
  }

  static void run(URI uri) throws Exception {
    DRIVER_LOG.setLevel(Level.WARNING);
    // The driver expects TLS unless told otherwise.
    String url = "jdbc:arrow-flight-sql://%s:%d/?useEncryption=false".formatted(uri.getHost(), uri.getPort());
    try (Connection connection = DriverManager.getConnection(url)) {
      var jdbc = new Jdbc(connection);
      jdbc.insertOrders();
      jdbc.crawl(connection.getMetaData());
      jdbc.askWithParameters();
      jdbc.readKinds();
      jdbc.breakRules();
    }
  }

  private void insertOrders() throws SQLException {
    try (Statement statement = connection.createStatement()) {
      int changed = statement.executeUpdate("CREATE TABLE orders_jdbc (id BIGINT, customer VARCHAR)");
      System.out.printf("create table: %d entries%n", changed);
    }
    try (PreparedStatement insert = connection.prepareStatement("INSERT INTO orders_jdbc (id, customer) VALUES (?, ?)")) {
      for (int id = 0; id < ROWS; id++) {
        insert.setLong(1, id);
        insert.setString(2, id % 2 == 0 ? "ada" : "grace");
        insert.addBatch();
      }
      // The driver sends a batch as one message, one append here, and so returns one count.
      System.out.printf("batch: %d entries%n", Arrays.stream(insert.executeBatch()).sum());
      insert.setLong(1, ROWS);
      insert.setString(2, "edsger");
      System.out.printf("prepared insert: %d entries%n", insert.executeUpdate());
    }
    try (Statement statement = connection.createStatement()) {
      int changed = statement.executeUpdate("INSERT INTO orders_jdbc (id, customer) VALUES (101, 'lin'), (102, NULL)");
      System.out.printf("insert: %d entries%n", changed);
    }
  }

  /** Asks what DBeaver and Tableau ask before they show a table. */
  private void crawl(DatabaseMetaData about) throws SQLException {
    System.out.printf("server: %s, quotes names with %s%n", about.getDatabaseProductName(), about.getIdentifierQuoteString());
    System.out.printf("catalogs: %s%n", column(about.getCatalogs(), "TABLE_CAT"));
    System.out.printf("schemas: %s%n", column(about.getSchemas(), "TABLE_SCHEM"));
    System.out.printf("table types: %s%n", column(about.getTableTypes(), "TABLE_TYPE"));
    System.out.printf("tables: %s%n", column(about.getTables(null, "public", "orders\\_%", new String[] {"TABLE", "VIEW"}), "TABLE_NAME"));
    var columns = new ArrayList<String>();
    try (ResultSet rows = about.getColumns(null, "public", "orders\\_jdbc", "%")) {
      while (rows.next()) {
        var type = JDBCType.valueOf(rows.getInt("DATA_TYPE"));
        columns.add("%s %s %s".formatted(rows.getString("COLUMN_NAME"), type, rows.getString("TYPE_NAME")));
      }
    }
    System.out.printf("columns: %s%n", String.join(", ", columns));
    System.out.printf("primary keys: %s%n", column(about.getPrimaryKeys(null, "public", "orders_jdbc"), "COLUMN_NAME"));
    System.out.printf("imported keys: %s%n", column(about.getImportedKeys(null, "public", "orders_jdbc"), "FKCOLUMN_NAME"));
    // This version of the driver does not ask the server for its types.
    System.out.printf("types: %s%n", column(about.getTypeInfo(), "TYPE_NAME"));
    System.out.printf("entry level of ANSI 92: %s%n", about.supportsANSI92EntryLevelSQL());
    System.out.printf("keywords: %s%n", about.getSQLKeywords().isEmpty() ? "none" : "some");
    var functions = List.of(about.getNumericFunctions().split(", *"));
    System.out.printf("numeric functions: %s%n", functions.contains("ABS") ? "ABS and others" : functions);
    System.out.printf("getters without an answer: %s%n", unanswered(about));
  }

  /** Returns the values of one column, in the order of the alphabet. */
  private static String column(ResultSet rows, String name) throws SQLException {
    var values = new TreeSet<String>();
    try (rows) {
      while (rows.next()) {
        values.add(rows.getString(name));
      }
    }
    return values.isEmpty() ? "none" : String.join(", ", values);
  }

  /** Calls everything a tool may ask that takes no argument: what a server leaves unsaid, the driver throws. */
  private static String unanswered(DatabaseMetaData about) {
    var failed = new TreeSet<String>();
    for (Method getter : DatabaseMetaData.class.getMethods()) {
      if (getter.getParameterCount() > 0 || getter.getReturnType() == ResultSet.class) {
        continue;
      }
      try {
        getter.invoke(about);
      } catch (InvocationTargetException | IllegalAccessException error) {
        failed.add(getter.getName());
      }
    }
    return failed.isEmpty() ? "none" : String.join(", ", failed);
  }

  private void askWithParameters() throws SQLException {
    String totals =
        """
        SELECT customer, count(*) AS n, sum(id) AS total FROM orders_jdbc
        WHERE id >= ? AND customer <> ? GROUP BY customer ORDER BY customer
        """;
    try (PreparedStatement query = connection.prepareStatement(totals)) {
      var taken = new ArrayList<String>();
      for (int i = 1; i <= query.getParameterMetaData().getParameterCount(); i++) {
        taken.add(JDBCType.valueOf(query.getParameterMetaData().getParameterType(i)).getName());
      }
      System.out.printf("parameters: %s%n", String.join(", ", taken));
      var given = new ArrayList<String>();
      ResultSetMetaData result = query.getMetaData();
      for (int i = 1; i <= result.getColumnCount(); i++) {
        given.add(result.getColumnLabel(i) + " " + result.getColumnTypeName(i));
      }
      System.out.printf("result: %s%n", String.join(", ", given));

      for (long first : new long[] {10, 99}) {
        query.setLong(1, first);
        query.setString(2, "lin");
        try (ResultSet rows = query.executeQuery()) {
          while (rows.next()) {
            System.out.printf("from %d: %s %d, total %d%n", first, rows.getString("customer"), rows.getInt("n"), rows.getLong("total"));
          }
        }
      }
    }
  }

  /** Reads each kind by a getter that gives all of it, in whatever time zone this program runs: getTimestamp does not. */
  private void readKinds() throws SQLException {
    String kinds =
        """
        SELECT CAST(12.5 AS DECIMAL(10, 2)) AS price, arrow_cast(1.5, 'Float16') AS half,
          arrow_cast('2026-07-01T12:00:00+02:00', 'Timestamp(ms, "Europe/Berlin")') AS at,
          INTERVAL '1 month 2 days 3 seconds' AS due, TIMESTAMP '2026-01-02 00:00:01' - TIMESTAMP '2026-01-01' AS took,
          ['ada', NULL] AS names, named_struct('x', 1, 'y', NULL) AS point, MAP {'a': [1, 2]} AS counts, NULL AS nothing
        """;
    try (PreparedStatement query = connection.prepareStatement(kinds);
        ResultSet row = query.executeQuery()) {
      ResultSetMetaData result = row.getMetaData();
      row.next();
      System.out.printf("decimal(%d, %d): %s%n", result.getPrecision(1), result.getScale(1), row.getBigDecimal("price"));
      System.out.printf("half: %s %s%n", result.getColumnTypeName(2), row.getFloat("half"));
      System.out.printf("with zone: %s%n", row.getObject("at", OffsetDateTime.class));
      System.out.printf("interval: %s%n", row.getString("due"));
      System.out.printf("duration: %s%n", row.getObject("took", Duration.class));
      System.out.printf("list: %s%n", Arrays.toString((Object[]) row.getArray("names").getArray()));
      System.out.printf("struct: %s%n", row.getObject("point", Map.class));
      System.out.printf("map: %s%n", row.getObject("counts", Map.class));
      System.out.printf("nothing: %s%n", row.getObject("nothing"));
    }
  }

  /** Shows what comes of a statement that a log does not know. */
  private void breakRules() throws SQLException {
    try (Statement statement = connection.createStatement()) {
      statement.executeUpdate("UPDATE orders_jdbc SET customer = 'lin'");
      throw new IllegalStateException("an entry was updated");
    } catch (SQLException error) {
      System.out.printf("error: %s%n", error.getMessage());
    }
  }
}

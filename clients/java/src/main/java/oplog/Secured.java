package oplog;

import java.io.IOException;
import java.io.Reader;
import java.net.URI;
import java.nio.file.Files;
import java.nio.file.Path;
import java.sql.Connection;
import java.sql.DatabaseMetaData;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import java.util.logging.Level;
import java.util.logging.Logger;

/** What each of several logins may see and do of a server with TLS, through the Flight SQL JDBC driver. */
final class Secured {
  // A login that is refused is logged with all its stack; kept here, as a logger that nobody holds forgets its level.
  private static final Logger DRIVER_LOG = Logger.getLogger("org.apache.arrow.driver.jdbc");

  private Secured() {}

  /**
   * Logs in once for each file of connection properties (user and password, or token, or clientCertificate and clientKey;
   * and whom to trust), or of a whole `url`. They are in files because a command line is for everybody to read.
   */
  static void run(URI uri, List<Path> logins) throws IOException {
    DRIVER_LOG.setLevel(Level.OFF);
    String plain = "jdbc:arrow-flight-sql://%s:%d/".formatted(uri.getHost(), uri.getPort());
    for (Path login : logins) {
      System.out.printf("%s%n", login.getFileName());
      var properties = new Properties();
      try (Reader reader = Files.newBufferedReader(login)) {
        properties.load(reader);
      }
      String url = properties.containsKey("url") ? (String) properties.remove("url") : plain;
      try (Connection connection = DriverManager.getConnection(url, properties)) {
        crawl(connection.getMetaData());
        read(connection, "orders");
        read(connection, "salaries");
        insert(connection);
      } catch (SQLException | RuntimeException error) { // the driver does not wrap what metadata fails with
        System.out.printf("  refused: %s%n", cause(error));
      }
    }
  }

  private static void crawl(DatabaseMetaData about) throws SQLException {
    var tables = new ArrayList<String>();
    try (ResultSet rows = about.getTables(null, null, "%", new String[] {"TABLE"})) {
      while (rows.next()) {
        tables.add(rows.getString("TABLE_SCHEM") + "." + rows.getString("TABLE_NAME"));
      }
    }
    System.out.printf("  tables: %s%n", String.join(", ", tables));
    var columns = new ArrayList<String>();
    try (ResultSet rows = about.getColumns(null, "public", "%", "%")) {
      while (rows.next()) {
        columns.add(rows.getString("TABLE_NAME") + "." + rows.getString("COLUMN_NAME"));
      }
    }
    System.out.printf("  columns: %s%n", String.join(", ", columns));
  }

  private static void read(Connection connection, String topic) {
    try (Statement statement = connection.createStatement();
        ResultSet rows = statement.executeQuery("SELECT count(*) FROM " + topic)) {
      rows.next();
      System.out.printf("  %s: %d entries%n", topic, rows.getLong(1));
    } catch (SQLException error) {
      System.out.printf("  %s: %s%n", topic, cause(error));
    }
  }

  private static void insert(Connection connection) {
    try (PreparedStatement insert = connection.prepareStatement("INSERT INTO orders (id, customer) VALUES (?, ?)")) {
      insert.setLong(1, 3);
      insert.setString(2, "edsger");
      System.out.printf("  insert: %d entries%n", insert.executeUpdate());
    } catch (SQLException error) {
      System.out.printf("  insert: %s%n", cause(error));
    }
  }

  /** Returns what was wrong, in the words of where it began: the driver wraps errors of the connection in others. */
  private static String cause(Throwable error) {
    Throwable cause = error;
    while (cause.getCause() != null) {
      cause = cause.getCause();
    }
    return cause.getClass().getSimpleName() + ": " + cause.getMessage();
  }
}

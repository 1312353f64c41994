package oplog;

import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.arrow.flight.CallHeaders;
import org.apache.arrow.flight.CallInfo;
import org.apache.arrow.flight.CallStatus;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightClientMiddleware;
import org.apache.arrow.flight.Location;
import org.apache.arrow.memory.BufferAllocator;

/**
 * How to log in, as the environment says. Secrets come from files: OPLOG_CA, the PEM file of the authorities that may vouch
 * for a server; OPLOG_USER and OPLOG_PASSWORD_FILE, or OPLOG_TOKEN_FILE with an API token or a JWT, or, where the server
 * takes those, OPLOG_CERT and OPLOG_KEY, the PEM files of a certificate and its key.
 */
final class Login implements FlightClientMiddleware.Factory {
  private static final String HEADER = "authorization";

  private volatile String authorization; // sent with every call

  private Login() {}

  /** Connects, and logs in where there is a user. */
  static FlightClient connect(BufferAllocator allocator, Location location) throws IOException {
    var login = new Login();
    var builder = FlightClient.builder(allocator, location).intercept(login); // a location of grpc+tls:// is of TLS
    if (System.getenv("OPLOG_CA") != null) {
      builder.trustedCertificates(open("OPLOG_CA"));
    }
    if (System.getenv("OPLOG_CERT") != null) {
      builder.clientCertificate(open("OPLOG_CERT"), open("OPLOG_KEY"));
    }
    if (System.getenv("OPLOG_TOKEN_FILE") != null) {
      login.authorization = "Bearer " + text("OPLOG_TOKEN_FILE");
    }
    FlightClient client = builder.build();
    if (System.getenv("OPLOG_USER") != null) {
      client.authenticateBasicToken(System.getenv("OPLOG_USER"), text("OPLOG_PASSWORD_FILE"));
    }
    return client;
  }

  private static InputStream open(String variable) throws IOException {
    return Files.newInputStream(Path.of(System.getenv(variable)));
  }

  private static String text(String variable) throws IOException {
    return Files.readString(Path.of(System.getenv(variable))).strip();
  }

  @Override
  public FlightClientMiddleware onCallStarted(CallInfo info) {
    return new FlightClientMiddleware() {
      @Override
      public void onBeforeSendingHeaders(CallHeaders outgoing) {
        if (authorization != null) {
          outgoing.insert(HEADER, authorization);
        }
      }

      /** Takes what a login with a password is answered with. */
      @Override
      public void onHeadersReceived(CallHeaders incoming) {
        if (incoming.containsKey(HEADER)) {
          authorization = incoming.get(HEADER);
        }
      }

      @Override
      public void onCallCompleted(CallStatus status) {}
    };
  }
}

// How to log in, as the environment says. Secrets come from files.
//
//     OPLOG_CA                            PEM file of the authorities that may vouch for a server (grpc+tls://)
//     OPLOG_USER and OPLOG_PASSWORD_FILE  a user's name and password
//     OPLOG_TOKEN_FILE                    or a bearer: an API token or a JWT
//     OPLOG_CERT and OPLOG_KEY            or PEM files of a certificate and its key, where the server takes those

#pragma once

#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <arrow/api.h>
#include <arrow/flight/api.h>
#include <arrow/flight/client_middleware.h>

namespace oplog {

struct Login {
  std::string authorities, user, password, token, certificate, key;

  static Login OfEnvironment() {
    const char* user = std::getenv("OPLOG_USER");
    return {File("OPLOG_CA"),         user == nullptr ? "" : user, File("OPLOG_PASSWORD_FILE"),
            File("OPLOG_TOKEN_FILE"), File("OPLOG_CERT"),          File("OPLOG_KEY")};
  }

 private:
  // What is in the file that a variable names, up to the end of its last line.
  static std::string File(const char* variable) {
    const char* name = std::getenv(variable);
    if (name == nullptr) return "";
    std::ostringstream text;
    text << std::ifstream(name).rdbuf();
    const std::string found = text.str();
    return found.substr(0, found.find_last_not_of("\r\n") + 1);
  }
};

// Sends a header with every call.
class Authorization : public arrow::flight::ClientMiddlewareFactory {
 public:
  std::string value;

  void StartCall(const arrow::flight::CallInfo&, std::unique_ptr<arrow::flight::ClientMiddleware>* started) override {
    if (!value.empty()) *started = std::make_unique<Sending>(value);
  }

 private:
  class Sending : public arrow::flight::ClientMiddleware {
   public:
    explicit Sending(std::string value) : value_(std::move(value)) {}
    void SendingHeaders(arrow::flight::AddCallHeaders* headers) override { headers->AddHeader("authorization", value_); }
    void ReceivedHeaders(const arrow::flight::CallHeaders&) override {}
    void CallCompleted(const arrow::Status&) override {}

   private:
    std::string value_;
  };
};

// Connects, and logs in where there is a user.
inline arrow::Result<std::unique_ptr<arrow::flight::FlightClient>> Connect(const std::string& uri) {
  const Login login = Login::OfEnvironment();
  const auto authorization = std::make_shared<Authorization>();
  auto options = arrow::flight::FlightClientOptions::Defaults();
  options.tls_root_certs = login.authorities;
  options.cert_chain = login.certificate;
  options.private_key = login.key;
  options.middleware.push_back(authorization);
  ARROW_ASSIGN_OR_RAISE(auto location, arrow::flight::Location::Parse(uri));
  ARROW_ASSIGN_OR_RAISE(auto client, arrow::flight::FlightClient::Connect(location, options));
  if (!login.user.empty()) {
    ARROW_ASSIGN_OR_RAISE(auto header, client->AuthenticateBasicToken({}, login.user, login.password));
    authorization->value = header.second;
  } else if (!login.token.empty()) {
    authorization->value = "Bearer " + login.token;
  }
  return client;
}

}  // namespace oplog

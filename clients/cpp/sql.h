// A connection to Flight SQL: ADBC's C API, with Arrow's own types, and errors as Arrow has them.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include <arrow-adbc/adbc.h>
#include <arrow/api.h>
#include <arrow/c/bridge.h>

#include "login.h"

namespace oplog {

class Sql {
 public:
  static arrow::Result<std::unique_ptr<Sql>> Connect(const std::string& uri) {
    std::unique_ptr<Sql> sql{new Sql};
    ARROW_RETURN_NOT_OK(Call(AdbcDatabaseNew, &sql->database_));
    const Login login = Login::OfEnvironment();
    const std::pair<const char*, std::string> options[] = {
        {ADBC_OPTION_URI, uri},
        {ADBC_OPTION_USERNAME, login.user},
        {ADBC_OPTION_PASSWORD, login.password},
        {"adbc.flight.sql.authorization_header", login.token.empty() ? "" : "Bearer " + login.token},
        {"adbc.flight.sql.client_option.tls_root_certs", login.authorities},
        {"adbc.flight.sql.client_option.mtls_cert_chain", login.certificate},
        {"adbc.flight.sql.client_option.mtls_private_key", login.key}};
    for (const auto& [name, value] : options) {
      if (!value.empty()) ARROW_RETURN_NOT_OK(Call(AdbcDatabaseSetOption, &sql->database_, name, value.c_str()));
    }
    ARROW_RETURN_NOT_OK(Call(AdbcDatabaseInit, &sql->database_));
    ARROW_RETURN_NOT_OK(Call(AdbcConnectionNew, &sql->connection_));
    ARROW_RETURN_NOT_OK(Call(AdbcConnectionInit, &sql->connection_, &sql->database_));
    return sql;
  }

  ~Sql() {
    if (connection_.private_data != nullptr) AdbcConnectionRelease(&connection_, nullptr);
    if (database_.private_data != nullptr) AdbcDatabaseRelease(&database_, nullptr);
  }

  // Writes all batches to a new table and returns how many rows they had.
  arrow::Result<int64_t> Ingest(const std::string& table, std::shared_ptr<arrow::RecordBatchReader> batches) {
    Statement statement;
    ARROW_RETURN_NOT_OK(Call(AdbcStatementNew, &connection_, &statement.raw));
    ARROW_RETURN_NOT_OK(Call(AdbcStatementSetOption, &statement.raw, ADBC_INGEST_OPTION_TARGET_TABLE, table.c_str()));
    ARROW_RETURN_NOT_OK(
        Call(AdbcStatementSetOption, &statement.raw, ADBC_INGEST_OPTION_MODE, ADBC_INGEST_OPTION_MODE_CREATE));
    ArrowArrayStream stream;
    ARROW_RETURN_NOT_OK(arrow::ExportRecordBatchReader(std::move(batches), &stream));
    ARROW_RETURN_NOT_OK(Call(AdbcStatementBindStream, &statement.raw, &stream));
    int64_t rows = -1;
    ARROW_RETURN_NOT_OK(Call(AdbcStatementExecuteQuery, &statement.raw, nullptr, &rows));
    return rows;
  }

  // Runs a query, with one row of values for its parameters where it has any.
  arrow::Result<std::shared_ptr<arrow::Table>> Query(const std::string& query,
                                                     const std::shared_ptr<arrow::RecordBatch>& values = nullptr) {
    Statement statement;
    ARROW_RETURN_NOT_OK(Call(AdbcStatementNew, &connection_, &statement.raw));
    ARROW_RETURN_NOT_OK(Call(AdbcStatementSetSqlQuery, &statement.raw, query.c_str()));
    if (values != nullptr) {
      ARROW_RETURN_NOT_OK(Call(AdbcStatementPrepare, &statement.raw));
      ArrowArray array;
      ArrowSchema schema;
      ARROW_RETURN_NOT_OK(arrow::ExportRecordBatch(*values, &array, &schema));
      ARROW_RETURN_NOT_OK(Call(AdbcStatementBind, &statement.raw, &array, &schema));
    }
    Stream stream;
    ARROW_RETURN_NOT_OK(Call(AdbcStatementExecuteQuery, &statement.raw, &stream.raw, nullptr));
    return stream.ReadAll();
  }

 private:
  struct Statement {
    AdbcStatement raw{};
    ~Statement() {
      if (raw.private_data != nullptr) AdbcStatementRelease(&raw, nullptr);
    }
  };

  // A result. arrow::ImportRecordBatchReader would read it, but aborts the program when it finds that a released stream
  // is not marked so, and version 1.13 of this driver leaves that to the driver manager, which there is none of here.
  struct Stream {
    ArrowArrayStream raw{};
    ~Stream() {
      if (raw.release != nullptr) raw.release(&raw);
    }

    arrow::Result<std::shared_ptr<arrow::Table>> ReadAll() {
      ArrowSchema c_schema;
      if (raw.get_schema(&raw, &c_schema) != 0) return Failed();
      ARROW_ASSIGN_OR_RAISE(auto schema, arrow::ImportSchema(&c_schema));
      arrow::RecordBatchVector batches;
      while (true) {
        ArrowArray c_array{};
        if (raw.get_next(&raw, &c_array) != 0) return Failed();
        if (c_array.release == nullptr) return arrow::Table::FromRecordBatches(schema, batches);
        ARROW_ASSIGN_OR_RAISE(auto batch, arrow::ImportRecordBatch(&c_array, schema));
        batches.push_back(std::move(batch));
      }
    }

    arrow::Status Failed() {
      const char* message = raw.get_last_error(&raw);
      return arrow::Status::IOError("ADBC: ", message != nullptr ? message : "the result broke off");
    }
  };

  Sql() = default;

  // Calls a function of ADBC; all take where to put an error last.
  template <typename Function, typename... Arguments>
  static arrow::Status Call(Function function, Arguments... arguments) {
    AdbcError error = ADBC_ERROR_INIT;
    const AdbcStatusCode code = function(arguments..., &error);
    auto status = arrow::Status::OK();
    if (code != ADBC_STATUS_OK) {
      const char* message = error.message != nullptr ? error.message : "no message";
      status = arrow::Status::IOError("ADBC status ", int{code}, ": ", message);
    }
    if (error.release != nullptr) error.release(&error);
    return status;
  }

  AdbcDatabase database_{};
  AdbcConnection connection_{};
};

}  // namespace oplog

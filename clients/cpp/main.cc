// A tour of flight_oplog from C++: produce exactly once, ingest in bulk, ask with parameters, follow a topic.
//
//     run URI            prints what each step was answered, on a log without these topics
//     run URI storm N    N appends that survive a server which is killed meanwhile

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <memory>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include <arrow/api.h>
#include <arrow/flight/api.h>

#include "login.h"
#include "oplog.h"
#include "sql.h"

namespace flight = arrow::flight;
using arrow::Result;
using arrow::Status;
using oplog::Answer;
using oplog::Connect;
using oplog::Producer;
using oplog::Sql;

template <typename Builder, typename Value>
Result<std::shared_ptr<arrow::Array>> Column(Builder builder, const std::vector<Value>& values) {
  ARROW_RETURN_NOT_OK(builder.AppendValues(values));
  return builder.Finish();
}

template <typename ArrayType>
const ArrayType& ColumnAs(const arrow::RecordBatch& batch, const std::string& name) {
  return dynamic_cast<const ArrayType&>(*batch.GetColumnByName(name));
}

// Produce exactly once

std::shared_ptr<arrow::Schema> OrdersSchema() {
  return arrow::schema({arrow::field("id", arrow::int64()), arrow::field("customer", arrow::utf8()),
                        arrow::field("amount", arrow::float64()),
                        arrow::field("placed", arrow::timestamp(arrow::TimeUnit::MICRO, "UTC"))});
}

// The `number`th append: two orders.
Result<std::shared_ptr<arrow::RecordBatch>> Orders(int64_t number) {
  constexpr int64_t kNewYear2026 = 1'767'225'600'000'000;  // microseconds since 1970
  constexpr int64_t kMinute = 60'000'000;
  const std::vector<int64_t> ids{2 * number, 2 * number + 1};
  const std::vector<int64_t> placed{kNewYear2026 + ids[0] * kMinute, kNewYear2026 + ids[1] * kMinute};
  const auto schema = OrdersSchema();
  arrow::ArrayVector columns(4);
  ARROW_ASSIGN_OR_RAISE(columns[0], Column(arrow::Int64Builder(), ids));
  ARROW_ASSIGN_OR_RAISE(columns[1], Column(arrow::StringBuilder(), std::vector<std::string>{"ada", "grace"}));
  ARROW_ASSIGN_OR_RAISE(columns[2],
                        Column(arrow::DoubleBuilder(), std::vector{10.0 * number + 0.5, 20.0 * number + 0.25}));
  ARROW_ASSIGN_OR_RAISE(
      columns[3], Column(arrow::TimestampBuilder(schema->field(3)->type(), arrow::default_memory_pool()), placed));
  return arrow::RecordBatch::Make(schema, 2, columns);
}

Result<std::string> Offsets(const Answer& answer) {
  if (answer.first_offset < 0) return Status::IOError("append ", answer.sequence, " has no receipt: ", answer.error);
  return "offsets " + std::to_string(answer.first_offset) + " to " +
         std::to_string(answer.first_offset + answer.entries - 1);
}

Status Produce(flight::FlightClient& client) {
  // All three are on their way before the first answer is read.
  ARROW_ASSIGN_OR_RAISE(auto producer, Producer::Open(client, "till-1", "orders", OrdersSchema()));
  for (int64_t number = 0; number < 3; ++number) {
    ARROW_ASSIGN_OR_RAISE(auto batch, Orders(number));
    ARROW_RETURN_NOT_OK(producer.Send(number, *batch));
  }
  for (int64_t number = 0; number < 3; ++number) {
    ARROW_ASSIGN_OR_RAISE(auto answer, producer.Read());
    ARROW_ASSIGN_OR_RAISE(auto offsets, Offsets(answer));
    std::cout << "append " << number << ": " << offsets << "\n";
  }

  // What is sent again, because its answer was lost, say, is not written again: the answer is the original one.
  ARROW_ASSIGN_OR_RAISE(auto known, Orders(1));
  ARROW_RETURN_NOT_OK(producer.Send(1, *known));
  ARROW_ASSIGN_OR_RAISE(auto again, producer.Read());
  ARROW_ASSIGN_OR_RAISE(auto offsets, Offsets(again));
  std::cout << "append 1 again: " << (again.duplicate ? "duplicate, " : "") << offsets << "\n";

  // A gap is refused: the answer says which sequence comes next, and then the stream fails.
  ARROW_ASSIGN_OR_RAISE(auto too_far, Orders(7));
  ARROW_RETURN_NOT_OK(producer.Send(7, *too_far));
  ARROW_ASSIGN_OR_RAISE(auto refusal, producer.Read());
  std::smatch expected;
  if (!std::regex_search(refusal.error, expected, std::regex("expected (\\d+)")) || producer.Close().ok()) {
    return Status::Invalid("append 7 was to be refused, not: ", refusal.error);
  }
  std::cout << "append 7: refused, expected " << expected[1] << "\n";
  return Status::OK();
}

// Ingest in bulk, and ask

Status Ingest(Sql& sql) {
  const auto schema = arrow::schema({arrow::field("id", arrow::int64()), arrow::field("value", arrow::float64())});
  arrow::RecordBatchVector batches;
  for (int64_t first = 0; first < 10000; first += 2500) {
    std::vector<int64_t> ids;
    std::vector<double> values;
    for (int64_t id = first; id < first + 2500; ++id) {
      ids.push_back(id);
      values.push_back(id / 4.0);
    }
    ARROW_ASSIGN_OR_RAISE(auto id, Column(arrow::Int64Builder(), ids));
    ARROW_ASSIGN_OR_RAISE(auto value, Column(arrow::DoubleBuilder(), values));
    batches.push_back(arrow::RecordBatch::Make(schema, 2500, {id, value}));
  }
  ARROW_ASSIGN_OR_RAISE(auto reader, arrow::RecordBatchReader::Make(batches, schema));
  ARROW_ASSIGN_OR_RAISE(auto rows, sql.Ingest("readings", reader));
  std::cout << "ingest: " << rows << " entries\n";
  return Status::OK();
}

Status Ask(Sql& sql) {
  ARROW_ASSIGN_OR_RAISE(auto readings, sql.Query("SELECT count(*) AS n, max(value) AS top FROM readings"));
  ARROW_ASSIGN_OR_RAISE(auto row, readings->CombineChunksToBatch());
  std::cout << "readings: " << ColumnAs<arrow::Int64Array>(*row, "n").Value(0) << ", top "
            << ColumnAs<arrow::DoubleArray>(*row, "top").Value(0) << "\n";

  // Values travel beside the statement, never in its text.
  ARROW_ASSIGN_OR_RAISE(auto amount, Column(arrow::DoubleBuilder(), std::vector{0.4}));
  ARROW_ASSIGN_OR_RAISE(auto customer, Column(arrow::StringBuilder(), std::vector<std::string>{"nobody"}));
  const auto schema =
      arrow::schema({arrow::field("amount", amount->type()), arrow::field("customer", customer->type())});
  ARROW_ASSIGN_OR_RAISE(auto orders,
                        sql.Query("SELECT customer, count(*) AS n, sum(amount) AS total FROM orders "
                                  "WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer",
                                  arrow::RecordBatch::Make(schema, 1, {amount, customer})));
  ARROW_ASSIGN_OR_RAISE(auto rows, orders->CombineChunksToBatch());
  for (int64_t i = 0; i < rows->num_rows(); ++i) {
    std::cout << ColumnAs<arrow::StringArray>(*rows, "customer").GetView(i) << ": "
              << ColumnAs<arrow::Int64Array>(*rows, "n").Value(i) << " orders, "
              << ColumnAs<arrow::DoubleArray>(*rows, "total").Value(i) << "\n";
  }
  return Status::OK();
}

// Follow

Status Follow(flight::FlightClient& client) {
  const flight::Ticket ticket(R"({"topic": "orders", "from": 4, "follow": true})");
  flight::FlightCallOptions options;
  // Columns are read where they lie in the message, at any address: have them moved to one that fits their type.
  options.read_options.ensure_alignment = arrow::ipc::Alignment::kDataTypeSpecificAlignment;
  ARROW_ASSIGN_OR_RAISE(auto stream, client.DoGet(options, ticket));
  int64_t seen = 0;
  int64_t next_offset = -1;
  while (seen < 2) {
    ARROW_ASSIGN_OR_RAISE(auto chunk, stream->Next());
    if (chunk.data == nullptr) return Status::IOError("the stream ended, and was to go on for ever");
    // No rows in a batch that only keeps the connection alive.
    for (int64_t i = 0; i < chunk.data->num_rows(); ++i) {
      std::cout << "tail: " << ColumnAs<arrow::Int64Array>(*chunk.data, "id").Value(i) << " "
                << ColumnAs<arrow::StringArray>(*chunk.data, "customer").GetView(i) << " "
                << ColumnAs<arrow::DoubleArray>(*chunk.data, "amount").Value(i) << "\n";
    }
    seen += chunk.data->num_rows();
    if (chunk.app_metadata != nullptr) {
      ARROW_ASSIGN_OR_RAISE(auto place, Answer::Parse(chunk.app_metadata));
      next_offset = place.next_offset;
    }
  }
  std::cout << "tail: next offset " << next_offset << "\n";
  stream->Cancel();
  return Status::OK();
}

Status Tour(const std::string& uri) {
  std::cout << std::fixed << std::setprecision(2);
  ARROW_ASSIGN_OR_RAISE(auto client, Connect(uri));
  ARROW_ASSIGN_OR_RAISE(auto sql, Sql::Connect(uri));
  ARROW_RETURN_NOT_OK(Produce(*client));
  ARROW_RETURN_NOT_OK(Ingest(*sql));
  ARROW_RETURN_NOT_OK(Ask(*sql));
  return Follow(*client);
}

// Survive

// Sends on a new connection all that is not acknowledged, and counts the answers until the last or the first error.
Status Send(const std::string& uri, int64_t total, int64_t* acknowledged) {
  constexpr int64_t kUnacknowledgedMax = 64;
  const auto schema = arrow::schema({arrow::field("n", arrow::int64())});
  ARROW_ASSIGN_OR_RAISE(auto client, Connect(uri));
  ARROW_ASSIGN_OR_RAISE(auto producer, Producer::Open(*client, "storm", "storm", schema));
  for (int64_t sent = *acknowledged; *acknowledged < total; ++*acknowledged) {
    for (; sent < std::min(total, *acknowledged + kUnacknowledgedMax); ++sent) {
      ARROW_ASSIGN_OR_RAISE(auto n, Column(arrow::Int64Builder(), std::vector{sent}));
      ARROW_RETURN_NOT_OK(producer.Send(sent, *arrow::RecordBatch::Make(schema, 1, {n})));
    }
    // Answers come in the order of the appends. A duplicate, written before an answer got lost, is as good.
    ARROW_ASSIGN_OR_RAISE(auto answer, producer.Read());
    if (answer.sequence != *acknowledged || !answer.error.empty()) {
      return Status::IOError("append ", *acknowledged, " was answered for ", answer.sequence, ": ", answer.error);
    }
  }
  return producer.Close();
}

// Makes `total` appends, each written exactly once, whatever happens to the server or the connection meanwhile: the
// producer has a name and numbers its appends, so what has no answer is simply sent again.
Status Storm(const std::string& uri, int64_t total) {
  using std::chrono::steady_clock;
  using namespace std::chrono_literals;
  int64_t acknowledged = 0;
  auto last_progress = steady_clock::now();
  auto backoff = 50ms;
  while (acknowledged < total) {
    const int64_t before = acknowledged;
    const Status status = Send(uri, total, &acknowledged);
    if (acknowledged > before) {
      last_progress = steady_clock::now();
      backoff = 50ms;
    }
    if (!status.ok()) {
      if (steady_clock::now() - last_progress > 60s) return status;
      std::this_thread::sleep_for(backoff);
      backoff = std::min(backoff * 2, 1000ms);
    }
  }
  std::cout << "storm: " << acknowledged << " appends acknowledged\n";
  return Status::OK();
}

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  Status status;
  if (arguments.size() == 1) {
    status = Tour(arguments[0]);
  } else if (arguments.size() == 3 && arguments[1] == "storm") {
    status = Storm(arguments[0], std::stoll(arguments[2]));
  } else {
    status = Status::Invalid("usage: run URI, or run URI storm N");
  }
  if (!status.ok()) std::cerr << status.ToString() << std::endl;
  return status.ok() ? 0 : 1;
}

// What the Flight client lacks for producing exactly once: appends with their numbers, and the server's answers.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include <arrow/api.h>
#include <arrow/flight/api.h>
#include <arrow/json/api.h>

namespace oplog {

namespace flight = arrow::flight;

// What the server sends beside data, in JSON. Numbers are -1, and texts empty, where it has none.
struct Answer {
  int64_t first_offset = -1;  // of a receipt; a duplicate may lack it
  int64_t entries = -1;
  int64_t sequence = -1;
  bool duplicate = false;
  std::string error;         // of a refusal
  int64_t next_offset = -1;  // of a tail: where to go on

  static arrow::Result<Answer> Parse(const std::shared_ptr<arrow::Buffer>& json) {
    static const auto numbers = {std::pair{"first_offset", &Answer::first_offset},
                                 std::pair{"entries", &Answer::entries},
                                 std::pair{"sequence", &Answer::sequence},
                                 std::pair{"next_offset", &Answer::next_offset}};
    auto options = arrow::json::ParseOptions::Defaults();
    arrow::FieldVector fields{arrow::field("duplicate", arrow::boolean()), arrow::field("error", arrow::utf8())};
    for (const auto& [name, member] : numbers) fields.push_back(arrow::field(name, arrow::int64()));
    options.explicit_schema = arrow::schema(fields);
    options.unexpected_field_behavior = arrow::json::UnexpectedFieldBehavior::Ignore;
    ARROW_ASSIGN_OR_RAISE(auto row, arrow::json::ParseOne(options, json));

    Answer answer;
    for (const auto& [name, member] : numbers) {
      const auto& column = static_cast<const arrow::Int64Array&>(*row->GetColumnByName(name));
      if (column.IsValid(0)) answer.*member = column.Value(0);
    }
    const auto& duplicate = static_cast<const arrow::BooleanArray&>(*row->GetColumnByName("duplicate"));
    answer.duplicate = duplicate.IsValid(0) && duplicate.Value(0);
    const auto& error = static_cast<const arrow::StringArray&>(*row->GetColumnByName("error"));
    if (error.IsValid(0)) answer.error = error.GetString(0);
    return answer;
  }
};

// One stream to a topic, from a named producer: each batch is an append, written once however often it is sent.
class Producer {
 public:
  static arrow::Result<Producer> Open(flight::FlightClient& client, const std::string& name, const std::string& topic,
                                      const std::shared_ptr<arrow::Schema>& schema) {
    flight::FlightCallOptions options;
    options.headers.emplace_back("oplog-producer", name);
    // No stream lasts longer, so one to a server that hangs ends too. What has no answer is sent again on the next.
    options.timeout = flight::TimeoutDuration{30};
    ARROW_ASSIGN_OR_RAISE(auto stream, client.DoPut(options, flight::FlightDescriptor::Path({topic}), schema));
    return Producer(std::move(stream));
  }

  // Returns as soon as the append is on its way. The answers are read in the order of the appends.
  arrow::Status Send(int64_t sequence, const arrow::RecordBatch& batch) {
    auto json = arrow::Buffer::FromString("{\"sequence\": " + std::to_string(sequence) + "}");
    return stream_.writer->WriteWithMetadata(batch, json);
  }

  arrow::Result<Answer> Read() {
    std::shared_ptr<arrow::Buffer> json;
    ARROW_RETURN_NOT_OK(stream_.reader->ReadMetadata(&json));
    if (json != nullptr) return Answer::Parse(json);
    ARROW_RETURN_NOT_OK(Close());
    return arrow::Status::IOError("the server ended the stream");
  }

  // Ends the stream, and returns what the server ended it with.
  arrow::Status Close() { return stream_.writer->Close(); }

 private:
  explicit Producer(flight::FlightClient::DoPutResult stream) : stream_(std::move(stream)) {}

  flight::FlightClient::DoPutResult stream_;
};

}  // namespace oplog

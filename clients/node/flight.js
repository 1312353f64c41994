// Arrow Flight and Flight SQL on grpc-js and apache-arrow, as far as client.js needs them.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { Message, MessageHeader, tableFromIPC, tableToIPC } from "apache-arrow";

const protos = ["flight.proto", "flight_sql.proto"].map((name) => fileURLToPath(new URL(name, import.meta.url)));
const messages = protoLoader.loadSync(protos, { keepCase: true, longs: Number, defaults: true });
const { FlightService } = grpc.loadPackageDefinition(messages).arrow.flight.protocol;

const SQL = "arrow.flight.protocol.sql.";
const Any = messages["google.protobuf.Any"];

// Flight SQL's messages travel in an Any, which says their name.
const pack = (name, value) =>
  Any.serialize({ type_url: `type.googleapis.com/${SQL}${name}`, value: messages[SQL + name].serialize(value) });
const unpack = (name, bytes) => messages[SQL + name].deserialize(bytes);
const command = (name, value) => ({ type: "CMD", cmd: pack(name, value) });

export class Flight {
  #client;

  #authorization = null; // the header that goes with every call

  constructor(uri, { authorities = null, certificate = null, key = null } = {}) {
    // Without these, a server that was away for a minute is tried again only every two minutes.
    const backoff = { "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 1000 };
    const { protocol, host } = new URL(uri);
    const credentials =
      protocol === "grpc+tls:"
        ? grpc.credentials.createSsl(authorities, key, certificate)
        : grpc.credentials.createInsecure();
    const interceptors = [(options, next) => new grpc.InterceptingCall(next(options), { start: this.#addHeader })];
    this.#client = new FlightService(host, credentials, { ...backoff, interceptors });
  }

  // Connect, and log in by a name and a password or by a token, which is an API token or a JWT, where there are any.
  // For TLS: the PEM texts of who may vouch for the server, and of a certificate and its key to show to it.
  static async connect(uri, { user, password, token, ...tls } = {}) {
    const flight = new Flight(uri, tls);
    if (token !== undefined) flight.#authorization = `Bearer ${token}`;
    if (user !== undefined) await flight.#handshake(`Basic ${Buffer.from(`${user}:${password}`).toString("base64")}`);
    return flight;
  }

  #addHeader = (metadata, listener, next) => {
    if (this.#authorization !== null) metadata.set("authorization", this.#authorization);
    next(metadata, listener);
  };

  // The answer has a header that stands for the password from then on.
  async #handshake(basic) {
    this.#authorization = basic;
    const call = this.#client.handshake();
    call.on("metadata", (metadata) => ([this.#authorization = basic] = metadata.get("authorization")));
    const stream = new Stream(call);
    stream.end();
    while ((await stream.read()) !== null);
  }

  close() {
    this.#client.close();
  }

  // Open a DoPut stream to a topic, or to any other descriptor.
  put(target, headers = {}, seconds = Infinity) {
    const descriptor = typeof target === "string" ? { type: "PATH", path: [target] } : target;
    const metadata = new grpc.Metadata();
    for (const [name, value] of Object.entries(headers)) metadata.set(name, value);
    return new PutStream(this.#client.doPut(metadata, { deadline: Date.now() + seconds * 1000 }), descriptor);
  }

  // Yield each batch of a DoGet as a table, with the metadata that came along. Leaving the loop cancels the call.
  async *get(ticket) {
    const head = []; // the schema, and dictionaries: what it takes to read any batch
    for await (const { frame, isBatch, metadata } of this.#frames(ticket)) {
      if (isBatch) yield { table: tableFromIPC(Buffer.concat([...head, frame])), metadata };
      else head.push(frame);
    }
  }

  async query(sql) {
    return this.#fetch(command("CommandStatementQuery", { query: sql }));
  }

  // Run a query with parameters: a table of one row, a column for each.
  async queryPrepared(sql, parameters) {
    const [created] = await this.#action("CreatePreparedStatement", pack("ActionCreatePreparedStatementRequest", { query: sql }));
    const result = unpack("ActionCreatePreparedStatementResult", Any.deserialize(created.body).value);
    let handle = { prepared_statement_handle: result.prepared_statement_handle };
    try {
      const binding = this.put(command("CommandPreparedStatementQuery", handle));
      await binding.send(parameters);
      binding.end();
      // A server may answer with a new handle, which then stands for the statement with its values.
      for await (const { app_metadata } of binding) {
        const bound = unpack("DoPutPreparedStatementResult", app_metadata);
        if (bound.prepared_statement_handle.length > 0) handle = bound;
      }
      return await this.#fetch(command("CommandPreparedStatementQuery", handle));
    } finally {
      // A courtesy, whose failure is nothing to report: the answer, or the error, is already known.
      await this.#action("ClosePreparedStatement", pack("ActionClosePreparedStatementRequest", handle)).catch(() => {});
    }
  }

  // Load tables into a new topic, as one append. Returns how many rows the server took.
  async ingest(topic, tables) {
    const options = { if_not_exist: "TABLE_NOT_EXIST_OPTION_CREATE", if_exists: "TABLE_EXISTS_OPTION_FAIL" };
    const stream = this.put(command("CommandStatementIngest", { table_definition_options: options, table: topic }));
    for (const table of tables) await stream.send(table);
    stream.end();
    let rows = null;
    for await (const { app_metadata } of stream) rows = unpack("DoPutUpdateResult", app_metadata).record_count;
    return rows;
  }

  async #fetch(descriptor) {
    const info = await new Promise((resolve, reject) =>
      this.#client.getFlightInfo(descriptor, (error, value) => (error ? reject(error) : resolve(value))),
    );
    const [{ ticket }] = info.endpoint; // flight_oplog gives one, to be asked for over the same connection
    const frames = [];
    for await (const { frame } of this.#frames(ticket.ticket)) frames.push(frame);
    return tableFromIPC(Buffer.concat(frames));
  }

  async *#frames(ticket) {
    for await (const data of new Stream(this.#client.doGet({ ticket }))) {
      if (data.data_header.length === 0) continue;
      const isBatch = Message.decode(data.data_header).headerType === MessageHeader.RecordBatch;
      yield { frame: framed(data), isBatch, metadata: data.app_metadata };
    }
  }

  async #action(type, body) {
    const results = [];
    for await (const result of new Stream(this.#client.doAction({ type, body }))) results.push(result);
    return results;
  }
}

// A stream of grpc-js as promises. (`for await (… of call)` would throw away what has arrived when a stream fails, and
// with it the receipts of what was written.)
class Stream {
  #call;
  #status = null;
  #waiting = [];

  constructor(call) {
    this.#call = call;
    const wake = () => this.#waiting.splice(0).forEach((resolve) => resolve());
    call.on("readable", wake).on("drain", wake);
    call.on("error", () => {}); // the status says the same, after all that was received
    call.on("status", (status) => {
      this.#status = status;
      wake();
    });
  }

  #changed() {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  // Return the next message, or null after the last. Throws when the call failed.
  async read() {
    for (;;) {
      const message = this.#call.read();
      if (message !== null) return message;
      if (this.#status?.code === grpc.status.OK) return null;
      if (this.#status !== null) throw Object.assign(new Error(this.#status.details), { code: this.#status.code });
      await this.#changed();
    }
  }

  // Iterating reads all that is left; leaving the loop cancels the call.
  async *[Symbol.asyncIterator]() {
    try {
      for (let message; (message = await this.read()) !== null;) yield message;
    } finally {
      this.cancel();
    }
  }

  // Send a message, and wait for room for the next. That the call failed is for `read` to say.
  async write(message) {
    if (this.#status === null) this.#call.write(message);
    while (this.#status === null && this.#call.writableNeedDrain) await this.#changed();
  }

  end() {
    this.#call.end();
  }

  cancel() {
    this.#call.cancel();
  }
}

// Its messages are the server's answers, with an app_metadata each.
class PutStream extends Stream {
  #descriptor; // goes with the first message, the schema

  constructor(call, descriptor) {
    super(call);
    this.#descriptor = descriptor;
  }

  // Send a table's batches. `metadata`, an object, goes along with each as JSON.
  async send(table, metadata = null) {
    for (const { isSchema, ...data } of unframed(tableToIPC(table, "stream"))) {
      if (!isSchema) {
        await this.write(metadata ? { ...data, app_metadata: Buffer.from(JSON.stringify(metadata)) } : data);
      } else if (this.#descriptor !== null) {
        await this.write({ ...data, flight_descriptor: this.#descriptor });
        this.#descriptor = null;
      }
    }
  }
}

// In an Arrow IPC stream a message is: FF FF FF FF, the header's length, header, body. In Flight it is header and body.
// The length counts padding to a multiple of 8, and 0 ends the stream.

function* unframed(bytes) {
  const words = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 0, length; at + 8 <= bytes.length && (length = words.getInt32(at + 4, true)) > 0;) {
    const header = bytes.subarray(at + 8, at + 8 + length);
    const message = Message.decode(header);
    at += 8 + length + Number(message.bodyLength);
    const body = bytes.subarray(at - Number(message.bodyLength), at);
    yield { isSchema: message.isSchema(), data_header: header, data_body: body };
  }
}

function framed({ data_header, data_body }) {
  const padding = -data_header.length & 7;
  const prefix = Buffer.from([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
  prefix.writeInt32LE(data_header.length + padding, 4);
  return Buffer.concat([prefix, data_header, Buffer.alloc(padding), data_body]);
}

// A client of flight_oplog in Node.
//
//     node client.js URI            one of everything, on a fresh log
//     node client.js URI storm N    N appends through whatever happens to the connection, each written once
//
// Take what you need: `appendEach` is the producer, `storm` the retry around it, `tail` the follower; flight.js is the
// protocol under them.

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { Float64, Int64, Table, TimestampMicrosecond, Utf8, vectorFromArray } from "apache-arrow";
import { Flight } from "./flight.js";

const IN_FLIGHT_MAX = 64;
const PAUSE_MS_MAX = 1000;
const PATIENCE_SECONDS = 60;

// Connect, and log in as the environment says. Secrets come from files: OPLOG_CA, the PEM file of the authorities that may
// vouch for a server (grpc+tls://); OPLOG_USER and OPLOG_PASSWORD_FILE, or OPLOG_TOKEN_FILE with an API token or a JWT, or,
// where the server takes those, OPLOG_CERT and OPLOG_KEY, the PEM files of a certificate and its key.
function connect(uri) {
  const { OPLOG_CA, OPLOG_USER, OPLOG_PASSWORD_FILE, OPLOG_TOKEN_FILE, OPLOG_CERT, OPLOG_KEY } = process.env;
  const pem = (file) => (file === undefined ? null : readFileSync(file));
  const secret = (file) => (file === undefined ? undefined : readFileSync(file, "utf8").trim());
  return Flight.connect(uri, {
    user: OPLOG_USER,
    password: secret(OPLOG_PASSWORD_FILE),
    token: secret(OPLOG_TOKEN_FILE),
    authorities: pem(OPLOG_CA),
    certificate: pem(OPLOG_CERT),
    key: pem(OPLOG_KEY),
  });
}

// The server answered an append with an error.
class Refused extends Error {
  constructor({ error, status }) {
    super(error);
    // Sending the same thing again can only help where the server says that it is not the request that is wrong.
    this.isPassing = ["UNAVAILABLE", "CANCELLED", "INTERNAL"].includes(status);
  }
}

// Send each [sequence, table of one batch] as an append of its own and yield their receipts, in their order; up to
// IN_FLIGHT_MAX appends are sent ahead of the receipts. After any error, what has no receipt may or may not have been
// written: send it again with the same sequence numbers, and the server writes it once.
async function* appendEach(flight, topic, producer, appends) {
  // The deadline is for a server that neither answers nor closes the connection. Whoever retries just goes on after it.
  const stream = flight.put(topic, { "oplog-producer": producer }, PATIENCE_SECONDS);
  const receipt = async () => {
    const answer = await stream.read();
    if (answer === null) throw new Error("the stream ended before all appends were acknowledged");
    const answered = JSON.parse(answer.app_metadata);
    if ("error" in answered) throw new Refused(answered);
    return answered;
  };
  try {
    let waiting = 0;
    for (const [sequence, table] of appends) {
      if (waiting === IN_FLIGHT_MAX) {
        yield await receipt();
        waiting--;
      }
      await stream.send(table, { sequence });
      waiting++;
    }
    stream.end();
    for (; waiting > 0; waiting--) yield await receipt();
  } finally {
    stream.cancel();
  }
}

const offsets = ({ first_offset, entries }) => `offsets ${first_offset} to ${first_offset + entries - 1}`;

// Append k: two orders. Types are given, because apache-arrow would make dictionaries of strings.
function orders(k) {
  const ids = [2 * k, 2 * k + 1];
  const placed = ids.map((id) => Date.UTC(2026, 0, 1, 0, id));
  return new Table({
    id: vectorFromArray(ids.map(BigInt), new Int64()),
    customer: vectorFromArray(["ada", "grace"], new Utf8()),
    amount: vectorFromArray([10 * k + 0.5, 20 * k + 0.25], new Float64()),
    placed: vectorFromArray(placed, new TimestampMicrosecond("UTC")),
  });
}

// Append exactly once: a producer that numbers its appends may send any of them again.
async function produce(flight) {
  const numbered = (...sequences) => sequences.map((k) => [k, orders(k)]);
  let k = 0;
  for await (const receipt of appendEach(flight, "orders", "till-1", numbered(0, 1, 2))) {
    console.log(`append ${k++}: ${offsets(receipt)}`);
  }

  // Sent again, append 1 is not written again: the receipt is the original one. A gap in the numbers, on the other
  // hand, means that appends were lost on the way here, and the server does not guess which.
  try {
    for await (const receipt of appendEach(flight, "orders", "till-1", numbered(1, 7))) {
      console.log(`append 1 again: ${receipt.duplicate ? "duplicate" : "written twice"}, ${offsets(receipt)}`);
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    console.log(`append 7: refused, expected ${error.message.match(/expected (\d+)/)?.[1]}`);
  }
}

// Load a table in bulk: all batches are one append, written whole or not at all.
async function ingest(flight) {
  const batch = (first) => {
    const ids = Array.from({ length: 2500 }, (_, row) => first + row);
    const value = Float64Array.from(ids, (id) => id / 4);
    return new Table({ id: vectorFromArray(BigInt64Array.from(ids, BigInt)), value: vectorFromArray(value) });
  };
  console.log(`ingest: ${await flight.ingest("readings", [0, 2500, 5000, 7500].map(batch))} entries`);
}

// Ask in SQL; the second question is a prepared statement with bound values.
async function ask(flight) {
  const [readings] = await flight.query("SELECT count(*) AS n, max(value) AS top FROM readings");
  console.log(`readings: ${readings.n}, top ${readings.top.toFixed(2)}`);

  const totals = `SELECT customer, count(*) AS n, sum(amount) AS total FROM orders
    WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer`;
  const parameters = new Table({ 1: vectorFromArray([0.4], new Float64()), 2: vectorFromArray(["nobody"], new Utf8()) });
  for (const { customer, n, total } of await flight.queryPrepared(totals, parameters)) {
    console.log(`${customer}: ${n} orders, ${total.toFixed(2)}`);
  }
}

// Follow a topic from an offset until so many entries came; more would come with every commit.
async function tail(flight, topic, from, entries) {
  let [seen, next] = [0, from];
  for await (const { table, metadata } of flight.get(Buffer.from(JSON.stringify({ topic, from, follow: true })))) {
    // A batch without rows is a sign of life.
    for (const { id, customer, amount } of table) console.log(`tail: ${id} ${customer} ${amount.toFixed(2)}`);
    seen += table.numRows;
    // Where to come back to. Large runs come in several batches, and only the last of them says it.
    if (metadata.length > 0) next = JSON.parse(metadata).next_offset;
    if (seen >= entries) break;
  }
  console.log(`tail: next offset ${next}`);
}

// Append 0 to `appends` - 1, one entry each; whatever breaks on the way, each is written once.
async function storm(uri, appends) {
  let [acknowledged, pause, lastProgress] = [0, 50, Date.now()];
  function* unacknowledged() {
    for (let n = acknowledged; n < appends; n++) yield [n, new Table({ n: vectorFromArray([BigInt(n)], new Int64()) })];
  }
  while (acknowledged < appends) {
    let flight;
    try {
      flight = await connect(uri);
      for await (const _ of appendEach(flight, "storm", "storm", unacknowledged())) {
        [acknowledged, pause, lastProgress] = [acknowledged + 1, 50, Date.now()];
      }
    } catch (error) {
      const isHopeless = error instanceof Refused && !error.isPassing;
      if (isHopeless || Date.now() - lastProgress > PATIENCE_SECONDS * 1000) throw error;
      await sleep(pause);
      pause = Math.min(2 * pause, PAUSE_MS_MAX);
    } finally {
      flight?.close();
    }
  }
  console.log(`storm: ${acknowledged} appends acknowledged`);
}

const [uri, mode, count] = process.argv.slice(2);
if (uri === undefined) {
  console.error("usage: client.js URI [storm N]");
  process.exitCode = 1;
} else if (mode === "storm") {
  await storm(uri, Number(count));
} else {
  const flight = await connect(uri);
  try {
    await produce(flight);
    await ingest(flight);
    await ask(flight);
    await tail(flight, "orders", 4, 2);
  } finally {
    flight.close();
  }
}

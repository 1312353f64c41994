//! A tour of flight_oplog from Rust: produce exactly once, ingest in bulk, ask with parameters, follow a topic.
//!
//!     run URI            prints what each step was answered, on a log without these topics
//!     run URI storm N    N appends that survive a server which is killed meanwhile (storm.rs)

mod login;
mod storm;

use std::error::Error;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_flight::decode::DecodedPayload;
use arrow_flight::sql::CommandStatementIngest;
use arrow_flight::sql::client::FlightSqlServiceClient;
use arrow_flight::sql::{TableDefinitionOptions, TableExistsOption, TableNotExistOption};
use arrow_flight::utils::batches_to_flight_data;
use arrow_flight::{FlightClient, FlightData, FlightDescriptor, FlightInfo, Ticket};
use arrow_schema::ArrowError;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::login::Login;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [uri] => tour(uri).await,
        [uri, word, number] if word == "storm" => storm::storm(uri, number.parse()?).await,
        _ => Err("usage: run URI, or run URI storm N".into()),
    }
}

async fn tour(uri: &str) -> Result<()> {
    // One connection carries everything; both clients and each call share it.
    let login = Login::connect(uri).await?;
    produce(login.flight()?).await?;
    let mut sql = login.sql();
    ingest(&mut sql).await?;
    ask(&mut sql).await?;
    follow(login.flight()?).await
}

// Produce exactly once

/// The `number`th append: two orders.
fn orders(number: i64) -> std::result::Result<RecordBatch, ArrowError> {
    const NEW_YEAR_2026: i64 = 1_767_225_600_000_000; // microseconds since 1970
    const MINUTE: i64 = 60_000_000;
    let ids = [2 * number, 2 * number + 1];
    let amounts = vec![10.0 * number as f64 + 0.5, 20.0 * number as f64 + 0.25];
    let placed = TimestampMicrosecondArray::from_iter_values(ids.map(|id| NEW_YEAR_2026 + id * MINUTE));
    RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(ids)) as ArrayRef),
        ("customer", Arc::new(StringArray::from(vec!["ada", "grace"]))),
        ("amount", Arc::new(Float64Array::from(amounts))),
        ("placed", Arc::new(placed.with_timezone("UTC"))),
    ])
}

/// Returns the messages of one stream to a topic: the schema, then each batch as an append with its sequence.
fn appends(topic: &str, numbered: &[(i64, RecordBatch)]) -> std::result::Result<Vec<FlightData>, ArrowError> {
    let batches = numbered.iter().map(|(_, batch)| batch);
    let mut messages = batches_to_flight_data(&numbered[0].1.schema(), batches)?;
    messages[0].flight_descriptor = Some(FlightDescriptor::new_path(vec![topic.into()]));
    for (message, (sequence, _)) in messages[1..].iter_mut().zip(numbered) {
        message.app_metadata = json!({ "sequence": sequence }).to_string().into();
    }
    Ok(messages)
}

async fn produce(mut client: FlightClient) -> Result<()> {
    client.add_header("oplog-producer", "till-1")?;

    // All three are on their way before the first answer is read.
    let numbered = [(0, orders(0)?), (1, orders(1)?), (2, orders(2)?)];
    let mut acks = client.do_put(stream::iter(appends("orders", &numbered)?).map(Ok)).await?;
    for (number, _) in &numbered {
        let ack = acks.try_next().await?.ok_or("the server ended the stream before the last answer")?;
        println!("append {number}: {}", offsets(&serde_json::from_slice(&ack.app_metadata)?)?);
    }

    // What is sent again, because its answer was lost, say, is not written again: the answer is the original one.
    let again = appends("orders", &[(1, orders(1)?)])?;
    let ack = client.do_put(stream::iter(again).map(Ok)).await?.try_next().await?.ok_or("no answer")?;
    let ack: Value = serde_json::from_slice(&ack.app_metadata)?;
    let word = if ack["duplicate"] == true { "duplicate, " } else { "" };
    println!("append 1 again: {word}{}", offsets(&ack)?);

    // A gap is refused. The answer says which sequence comes next, and then the stream fails.
    let gap = appends("orders", &[(7, orders(7)?)])?;
    let answers: Vec<_> = client.do_put(stream::iter(gap).map(Ok)).await?.collect().await;
    let [Ok(refusal), Err(_)] = &answers[..] else {
        return Err(format!("append 7 was to be refused, not {answers:?}").into());
    };
    let refusal: Value = serde_json::from_slice(&refusal.app_metadata)?;
    let error = refusal["error"].as_str().unwrap_or_default();
    let expected = error.split("expected ").nth(1).ok_or_else(|| error.to_owned())?;
    let digits: String = expected.chars().take_while(char::is_ascii_digit).collect();
    println!("append 7: refused, expected {digits}");
    Ok(())
}

fn offsets(ack: &Value) -> Result<String> {
    let (Some(first), Some(entries)) = (ack["first_offset"].as_i64(), ack["entries"].as_i64()) else {
        return Err(format!("not a receipt: {ack}").into());
    };
    Ok(format!("offsets {first} to {}", first + entries - 1))
}

// Ingest in bulk, and ask

async fn ingest(sql: &mut FlightSqlServiceClient<Channel>) -> Result<()> {
    let batches = (0..4).map(|number| {
        let ids = number * 2500..(number + 1) * 2500;
        let values = ids.clone().map(|id| id as f64 / 4.0);
        Ok(RecordBatch::try_from_iter([
            ("id", Arc::new(Int64Array::from_iter_values(ids)) as ArrayRef),
            ("value", Arc::new(Float64Array::from_iter_values(values))),
        ])?)
    });
    let mut command = CommandStatementIngest { table: "readings".into(), ..Default::default() };
    let mut options = TableDefinitionOptions::default();
    options.set_if_not_exist(TableNotExistOption::Create);
    options.set_if_exists(TableExistsOption::Fail);
    command.table_definition_options = Some(options);
    let entries = sql.execute_ingest(command, stream::iter(batches)).await?;
    println!("ingest: {entries} entries");
    Ok(())
}

async fn ask(sql: &mut FlightSqlServiceClient<Channel>) -> Result<()> {
    let info = sql.execute("SELECT count(*) AS n, max(value) AS top FROM readings".into(), None).await?;
    for row in fetch(sql, info).await? {
        let n = row["n"].as_primitive::<Int64Type>().value(0);
        let top = row["top"].as_primitive::<Float64Type>().value(0);
        println!("readings: {n}, top {top:.2}");
    }

    // Values travel beside the statement, never in its text.
    let query = "SELECT customer, count(*) AS n, sum(amount) AS total FROM orders \
                 WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer";
    let mut statement = sql.prepare(query.into(), None).await?;
    statement.set_parameters(RecordBatch::try_from_iter([
        ("amount", Arc::new(Float64Array::from(vec![0.4])) as ArrayRef),
        ("customer", Arc::new(StringArray::from(vec!["nobody"]))),
    ])?)?;
    let info = statement.execute().await?;
    let batches = fetch(sql, info).await?;
    statement.close().await?;
    for batch in &batches {
        let customers = batch["customer"].as_string::<i32>();
        let counts = batch["n"].as_primitive::<Int64Type>();
        let totals = batch["total"].as_primitive::<Float64Type>();
        for row in 0..batch.num_rows() {
            println!("{}: {} orders, {:.2}", customers.value(row), counts.value(row), totals.value(row));
        }
    }
    Ok(())
}

/// Returns all batches of a result; the server hands out a ticket for each part of it.
async fn fetch(sql: &mut FlightSqlServiceClient<Channel>, info: FlightInfo) -> Result<Vec<RecordBatch>> {
    let mut batches = Vec::new();
    for endpoint in info.endpoint {
        let ticket = endpoint.ticket.ok_or("an endpoint without a ticket")?;
        batches.extend(sql.do_get(ticket).await?.try_collect::<Vec<_>>().await?);
    }
    Ok(batches)
}

// Follow

async fn follow(mut client: FlightClient) -> Result<()> {
    let ticket = json!({ "topic": "orders", "from": 4, "follow": true });
    let stream = client.do_get(Ticket::new(ticket.to_string())).await?;
    // The messages themselves, not only their batches: each says in its metadata where to go on after it.
    let mut messages = stream.into_inner();
    let (mut seen, mut next_offset) = (0, None);
    while seen < 2 {
        let message = messages.try_next().await?.ok_or("the stream ended, and was to go on for ever")?;
        let DecodedPayload::RecordBatch(batch) = &message.payload else { continue };
        for row in 0..batch.num_rows() {
            let id = batch["id"].as_primitive::<Int64Type>().value(row);
            let customer = batch["customer"].as_string::<i32>().value(row);
            let amount = batch["amount"].as_primitive::<Float64Type>().value(row);
            println!("tail: {id} {customer} {amount:.2}");
        }
        seen += batch.num_rows(); // none in a batch that only keeps the connection alive
        if let Ok(place) = serde_json::from_slice::<Value>(&message.app_metadata()) {
            next_offset = place["next_offset"].as_i64().or(next_offset);
        }
    }
    println!("tail: next offset {}", next_offset.ok_or("no message said where to go on")?);
    Ok(()) // a stream that is dropped is cancelled
}

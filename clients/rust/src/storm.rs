//! Appends that are written exactly once, whatever happens to the server or the connection meanwhile.
//!
//! The producer has a name and numbers its appends, so what has no answer is simply sent again: the server knows by
//! name and sequence what it has written already, and says so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Int64Array, RecordBatch};
use futures::TryStreamExt;
use futures::channel::mpsc;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::login::Login;
use crate::{Result, appends};

const UNACKNOWLEDGED_MAX: i64 = 64;
const SILENCE_MAX: Duration = Duration::from_secs(10);
const NO_PROGRESS_MAX: Duration = Duration::from_secs(60);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

pub async fn storm(uri: &str, total: i64) -> Result<()> {
    let mut acknowledged = 0;
    let mut last_progress = Instant::now();
    let mut backoff = BACKOFF_MIN;
    while acknowledged < total {
        let before = acknowledged;
        let result = send(uri, total, &mut acknowledged).await;
        if acknowledged > before {
            last_progress = Instant::now();
            backoff = BACKOFF_MIN;
        }
        if let Err(error) = result {
            if last_progress.elapsed() > NO_PROGRESS_MAX {
                return Err(format!("{acknowledged} of {total} acknowledged, then no progress: {error}").into());
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
    println!("storm: {acknowledged} appends acknowledged");
    Ok(())
}

/// Sends on a new connection all that is not acknowledged, and counts the answers until the last or the first error.
async fn send(uri: &str, total: i64, acknowledged: &mut i64) -> Result<()> {
    let mut client = timeout(SILENCE_MAX, Login::connect(uri)).await??.flight()?;
    client.add_header("oplog-producer", "storm")?;

    let first = *acknowledged;
    let mut sent = first;
    // The channel need not be bounded: the window is.
    let (sender, receiver) = mpsc::unbounded();
    let mut fill_window = |acknowledged| -> Result<()> {
        while sent < total.min(acknowledged + UNACKNOWLEDGED_MAX) {
            let batch = RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(vec![sent])) as ArrayRef)])?;
            let schema_sent_already = usize::from(sent > first);
            for message in appends("storm", &[(sent, batch)])?.into_iter().skip(schema_sent_already) {
                // Where nobody takes it any more, the stream is broken, and the answers end with the reason.
                let _ = sender.unbounded_send(Ok(message));
            }
            sent += 1;
        }
        Ok(())
    };

    // The call returns with the first answer, so something must be under way before.
    fill_window(first)?;
    let mut acks = timeout(SILENCE_MAX, client.do_put(receiver)).await??;
    while *acknowledged < total {
        let ack = timeout(SILENCE_MAX, acks.try_next()).await??.ok_or("the server ended the stream")?;
        let ack: Value = serde_json::from_slice(&ack.app_metadata)?;
        // Answers come in the order of the appends. A duplicate, written before an answer got lost, is as good.
        if ack["sequence"] != *acknowledged || ack.get("error").is_some() {
            return Err(format!("append {acknowledged} was answered {ack}").into());
        }
        *acknowledged += 1;
        fill_window(*acknowledged)?;
    }
    Ok(())
}

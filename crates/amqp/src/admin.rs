//! What can be asked of queues beside their messages: to be counted, emptied, bound, unbound and deleted; and whether
//! anybody is there.

use lapin::{
    Channel,
    options::{QueueDeleteOptions, QueuePurgeOptions},
    types::FieldTable,
};
use polymq_core::{Error, Result, Stats};

use crate::{
    convert::short,
    error::{self, Stage},
    link::Live,
    topology::{self, Binding},
};

/// Deletes a queue. RabbitMQ takes the deletion of one that does not exist for done.
pub(crate) async fn delete(live: &Live, queue: &str) -> Result<()> {
    let channel = open(live, "delete").await?;
    channel.queue_delete(short(queue)?, QueueDeleteOptions::default()).await.map_err(failed("delete"))?;
    end(channel).await;
    Ok(())
}

/// A queue gets what its binding asks for.
pub(crate) async fn bind(live: &Live, queue: &str, binding: &Binding) -> Result<()> {
    let channel = open(live, "bind").await?;
    topology::bind(&channel, queue, binding).await?;
    end(channel).await;
    Ok(())
}

/// A queue gets no more of what this pattern matches.
pub(crate) async fn unbind(live: &Live, queue: &str, exchange: &str, pattern: &str) -> Result<()> {
    let channel = open(live, "unbind").await?;
    let unbind = channel.queue_unbind(short(queue)?, short(exchange)?, short(pattern)?, FieldTable::default());
    unbind.await.map_err(failed("unbind"))?;
    end(channel).await;
    Ok(())
}

/// Counts; RabbitMQ does not tell of what is delivered and not settled.
pub(crate) async fn stats(live: &Live, queue: &str) -> Result<Stats> {
    let found = topology::inspect(&live.connection, queue).await?;
    let found = found.ok_or_else(|| topology::not_found("queue", queue))?;
    Ok(Stats { ready: found.message_count().into(), unsettled: None, consumers: found.consumer_count().into() })
}

/// Empties a queue and says how much was in it.
pub(crate) async fn purge(live: &Live, queue: &str) -> Result<u64> {
    let channel = open(live, "purge").await?;
    let count = channel.queue_purge(short(queue)?, QueuePurgeOptions::default()).await.map_err(failed("purge"))?;
    end(channel).await;
    Ok(count.into())
}

/// A round trip.
pub(crate) async fn ping(live: &Live) -> Result<()> {
    open(live, "ping").await?.close(200, "pong".into()).await.map_err(failed("ping"))
}

async fn open(live: &Live, operation: &'static str) -> Result<Channel> {
    live.connection.create_channel().await.map_err(failed(operation))
}

async fn end(channel: Channel) {
    let _ = channel.close(200, "done".into()).await;
}

fn failed(operation: &'static str) -> impl Fn(lapin::Error) -> Error {
    move |error| error::native(operation, error, Stage::Operation)
}

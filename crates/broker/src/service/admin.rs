//! Creating, deleting and listing channels: queries to a magic channel, with the operation as metadata. Ours are the
//! operations on readers of stored events.

use std::collections::BTreeSet;

use polymq_kubemq_proto::{Request, Response};
use serde_json::{Value, json};

use crate::{
    access::Caller,
    broker::Shared,
    names,
    queue::now,
    readers,
    refusal::Refusal,
    row::Row,
    rules::{Action, Resource},
    store::StoreError,
};

/// Where such queries go.
pub(super) const CHANNEL: &str = "kubemq.cluster.internal.requests";

pub(super) async fn answer(shared: &Shared, caller: &Caller, request: Request) -> Response {
    let tag = |name: &str| request.tags.get(name).map_or("", String::as_str);
    let (kind, channel) = (tag("channel_type"), tag("channel"));
    let may = |action, resource, channel: &str| caller.may(action, resource, &request.client_id, channel);
    let result = match request.metadata.as_str() {
        "create-channel" => create(shared, kind, channel, may).await.map(|()| Vec::new()),
        "delete-channel" => delete(shared, kind, channel, may).await.map(|()| Vec::new()),
        "list-channels" => {
            // Who asks for what it may see was refused nothing.
            let can = |resource, channel: &str| {
                let can = |action| caller.can(action, resource, &request.client_id, channel);
                can(Action::Read) || can(Action::Write)
            };
            list(shared, kind, tag("channel_search"), can)
        }
        "list-readers" => list_readers(shared, channel, may),
        "delete-reader" => {
            delete_reader(shared, channel, (tag("client"), tag("group")), may).await.map(|()| Vec::new())
        }
        other => Err(Refusal::because(format_args!(
            "unknown operation {other:?}: expected create-channel, delete-channel, list-channels, list-readers or delete-reader"
        ))),
    };
    let (body, error) = match result {
        Ok(body) => (body, String::new()),
        Err(refusal) => (Vec::new(), refusal.to_string()),
    };
    Response {
        client_id: request.client_id,
        request_id: request.request_id,
        body: body.into(),
        timestamp: now(),
        executed: error.is_empty(),
        error,
        ..Response::default()
    }
}

fn known(kind: &str) -> Result<Resource, Refusal> {
    match kind {
        "events" => Ok(Resource::Events),
        "events_store" => Ok(Resource::EventsStore),
        "commands" => Ok(Resource::Commands),
        "queries" => Ok(Resource::Queries),
        "queues" => Ok(Resource::Queues),
        _ => Err(Refusal::because(format_args!(
            "unknown channel type {kind:?}: expected events, events_store, commands, queries or queues"
        ))),
    }
}

/// Whether the caller may do something with a channel.
trait May: Fn(Action, Resource, &str) -> Result<(), Refusal> {}

impl<T: Fn(Action, Resource, &str) -> Result<(), Refusal>> May for T {}

/// When that is answered, a channel that keeps anything is on disk.
async fn create(shared: &Shared, kind: &str, channel: &str, may: impl May) -> Result<(), Refusal> {
    may(Action::Write, known(kind)?, channel)?;
    match kind {
        "queues" => {
            names::check_queue(channel)?;
            on_disk(shared, || Ok(shared.queues.get(channel)?.row.clone())).await?;
        }
        "events_store" => {
            names::check_stored(channel)?;
            on_disk(shared, || Ok(shared.logs.get(channel)?.row.clone())).await?;
        }
        _ => {
            names::check(channel)?;
            let most = shared.queues.limits().channels;
            shared.named(kind, |names| {
                if names.len() >= most && !names.contains(channel) {
                    return Err(Refusal::channels(most));
                }
                names.insert(channel.to_owned());
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Waits until the channel of a name is stored.
async fn on_disk(shared: &Shared, row: impl Fn() -> Result<Row, Refusal>) -> Result<(), Refusal> {
    loop {
        match row()?.stored(&shared.store).await {
            // It was just being deleted, and that is done: the next one has its name.
            Err(StoreError::Gone) => {}
            stored => return Ok(stored?),
        }
    }
}

async fn delete(shared: &Shared, kind: &str, channel: &str, may: impl May) -> Result<(), Refusal> {
    may(Action::Write, known(kind)?, channel)?;
    let there = match kind {
        "queues" => shared.queues.remove(channel).await?,
        "events_store" => shared.logs.remove(channel).await?,
        _ => shared.named(kind, |names| names.remove(channel)),
    };
    if there { Ok(()) } else { Err(not_found()) }
}

/// Who reads a channel of stored events or has read it: each with its next sequence.
fn list_readers(shared: &Shared, channel: &str, may: impl May) -> Result<Vec<u8>, Refusal> {
    may(Action::Read, Resource::EventsStore, channel)?;
    let log = shared.logs.find(channel).ok_or_else(not_found)?;
    let found = log.store().readers(log.id)?.into_iter().map(|(reader, next, seen)| {
        let (kind, name) = reader.split_once(' ').unwrap_or(("client", &reader));
        json!({kind: name, "next": next, "lastActivity": seen / 1_000_000, "isActive": log.is_read_by(&reader)})
    });
    serde_json::to_vec(&Value::Array(found.collect())).map_err(Refusal::because)
}

async fn delete_reader(
    shared: &Shared,
    channel: &str,
    (client, group): (&str, &str),
    may: impl May,
) -> Result<(), Refusal> {
    may(Action::Write, Resource::EventsStore, channel)?;
    if client.is_empty() == group.is_empty() {
        return Err(Refusal::because("a reader is named by one of the tags \"client\" and \"group\""));
    }
    let log = shared.logs.find(channel).ok_or_else(not_found)?;
    let there = readers::forget(&log, &readers::name(client, group)).await?;
    if there { Ok(()) } else { Err(Refusal::because("reader not found")) }
}

fn not_found() -> Refusal {
    Refusal::because("channel not found")
}

fn list(shared: &Shared, kind: &str, search: &str, can: impl Fn(Resource, &str) -> bool) -> Result<Vec<u8>, Refusal> {
    let resource = known(kind)?;
    let seen = |name: &str| can(resource, name);
    let traffic = |messages: u64, volume: u64, waiting: u64, expired: u64, delayed: u64| json!({"messages": messages, "volume": volume, "waiting": waiting, "expired": expired, "delayed": delayed});
    let entry = |name: &str, active_at: i64, active: bool, incoming: Value, outgoing: Value| json!({"name": name, "type": kind, "lastActivity": active_at, "isActive": active, "incoming": incoming, "outgoing": outgoing});
    let mut found = Vec::new();
    match kind {
        "queues" => {
            for queue in shared.queues.all() {
                let stats = queue.stats();
                let (waiting, expired, delayed) = (small(stats.messages), small(stats.expired), small(stats.delayed));
                let incoming = traffic(small(stats.incoming), small(stats.incoming_bytes), waiting, expired, delayed);
                let outgoing = traffic(small(stats.outgoing), small(stats.outgoing_bytes), waiting, expired, delayed);
                found.push((queue.name.clone(), entry(&queue.name, stats.active_at, true, incoming, outgoing)));
            }
        }
        "events_store" => {
            for log in shared.logs.all() {
                let (count, (kept, bytes)) = (log.count(), log.kept.size());
                found.push((
                    log.name.clone(),
                    entry(&log.name, 0, true, traffic(count, bytes, kept, 0, 0), traffic(0, 0, 0, 0, 0)),
                ));
            }
        }
        _ => {
            let listened: BTreeSet<_> = shared.listened(kind).into_iter().collect();
            let names = &shared.named(kind, |names| names.clone()) | &listened;
            for name in names {
                let plain = || json!({"messages": 0, "volume": 0, "responses": 0});
                let active = listened.contains(&name);
                found.push((name.clone(), entry(&name, 0, active, plain(), plain())));
            }
        }
    }
    let matching = found.into_iter().filter(|(name, _)| wanted(search, name) && seen(name)).map(|(_, entry)| entry);
    serde_json::to_vec(&Value::Array(matching.collect())).map_err(Refusal::because)
}

/// Some SDKs read the figures of queues, and of no other kind, into 32 bits with a sign.
fn small(number: u64) -> u64 {
    number.min(i32::MAX.unsigned_abs().into())
}

/// An empty search finds all; with `*` it is a pattern, else a part of the name.
fn wanted(search: &str, name: &str) -> bool {
    if !search.contains('*') {
        return name.contains(search);
    }
    let mut parts = search.split('*');
    let (first, mut rest) = (parts.next().unwrap_or(""), name);
    match rest.strip_prefix(first) {
        Some(left) => rest = left,
        None => return false,
    }
    let mut parts: Vec<_> = parts.collect();
    let last = parts.pop().unwrap_or("");
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::small;

    #[test]
    fn figures_of_queues_fit_into_32_bits() {
        assert_eq!(
            [0, 7, 2_147_483_647, 2_147_483_648, u64::MAX].map(small),
            [0, 7, 2_147_483_647, 2_147_483_647, 2_147_483_647]
        );
    }
}

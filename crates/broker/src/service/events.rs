//! The calls on events, stored or not.

use std::sync::Arc;

use futures_util::StreamExt;
use polymq_kubemq_proto::{
    Event, EventReceive, Result as Sent, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};
use prost::Message as _;
use tonic::{Status, Streaming};

use super::{Answers, in_flight, in_flight_room, readable};
use crate::{
    access::Caller,
    broker::Shared,
    names,
    refusal::Refusal,
    rules::{Action, Resource},
    store::StoreError,
};

/// Sends one event; with an id, in case it had none.
pub(super) async fn send(shared: &Shared, caller: &Caller, event: Event) -> Result<String, (String, Refusal)> {
    enter(shared, caller, event).await.await
}

/// Hands an event over; the future answers when it is where it must be.
async fn enter(
    shared: &Shared,
    caller: &Caller,
    mut event: Event,
) -> impl Future<Output = Result<String, (String, Refusal)>> + Send + use<> {
    if event.event_id.is_empty() {
        event.event_id = crate::queues::message_id();
    }
    let id = event.event_id.clone();
    let entered = async {
        if event.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        if event.store {
            names::check_stored(&event.channel)?
        } else {
            names::check(&event.channel)?
        }
        if event.metadata.is_empty() && event.body.is_empty() {
            return Err(Refusal::empty_message());
        }
        shared.queues.limits().check_size(&event.metadata, &event.body, &event.tags)?;
        let resource = if event.store { Resource::EventsStore } else { Resource::Events };
        caller.may(Action::Write, resource, &event.client_id, &event.channel)?;
        if event.store {
            return Ok(Some(shared.logs.get(&event.channel)?.append(event).await?));
        }
        let received = EventReceive {
            event_id: event.event_id,
            channel: event.channel,
            metadata: event.metadata,
            body: event.body,
            tags: event.tags,
            ..EventReceive::default()
        };
        let name = received.channel.clone();
        shared.events.tell(&name, &received, received.encoded_len());
        Ok(None)
    };
    let entered = entered.await;
    async move {
        let result = match entered {
            Ok(None) => Ok(()),
            Ok(Some(stored)) => stored.await.unwrap_or(Err(StoreError::Closed)).map_err(Refusal::from),
            Err(refusal) => Err(refusal),
        };
        match result {
            Ok(()) => Ok(id),
            Err(refusal) => Err((id, refusal)),
        }
    }
}

/// A stream of events: stored ones are answered in order, plain ones only when they are refused.
#[allow(clippy::async_yields_async)] // entered in order, awaited beside each other
pub(super) fn send_stream(shared: Arc<Shared>, caller: Caller, events: Streaming<Event>) -> Answers<Sent> {
    let stopping = shared.stopping.clone();
    let room = in_flight_room();
    let answers = readable(events)
        .take_until(stopping.cancelled_owned())
        .then(move |event| {
            let (shared, caller, room) = (Arc::clone(&shared), caller.clone(), Arc::clone(&room));
            async move {
                let entered = match event {
                    Ok(event) => {
                        let (event, room) = in_flight(room, event.encoded_len(), event).await;
                        Ok((event.store, enter(&shared, &caller, event).await, room))
                    }
                    Err(status) => Err(status),
                };
                async move {
                    let (store, entered, _room) = match entered {
                        Ok(entered) => entered,
                        Err(status) => return Some(Err(status)),
                    };
                    match entered.await {
                        Ok(event_id) => store.then(|| Ok(Sent { event_id, sent: true, error: String::new() })),
                        Err((event_id, refusal)) => {
                            Some(Ok(Sent { event_id, sent: false, error: refusal.to_string() }))
                        }
                    }
                }
            }
        })
        .buffered(256)
        .filter_map(std::future::ready);
    Box::pin(answers)
}

pub(super) async fn subscribe(
    shared: &Arc<Shared>,
    caller: Caller,
    subscribe: Subscribe,
) -> Result<Answers<EventReceive>, Status> {
    match subscribe.subscribe_type_data() {
        SubscribeType::Events => listen(shared, caller, subscribe).map_err(|refusal| refusal.status()),
        SubscribeType::EventsStore => read(shared, &caller, &subscribe).await.map_err(|refusal| refusal.status()),
        _ => Err(Refusal::subscribe_type().status()),
    }
}

fn listen(shared: &Arc<Shared>, caller: Caller, subscribe: Subscribe) -> Result<Answers<EventReceive>, Refusal> {
    if subscribe.client_id.is_empty() {
        return Err(Refusal::no_client());
    }
    names::check_pattern(&subscribe.channel)?;
    names::check_client(&subscribe.client_id, &subscribe.group)?;
    if subscribe.events_store_type_data() != EventsStoreType::Undefined {
        return Err(Refusal::not_a_store());
    }
    caller.may(Action::Read, Resource::Events, &subscribe.client_id, &subscribe.channel)?;
    let listening = shared.events.listen(&subscribe.channel, &subscribe.group);
    let events = futures_util::stream::unfold(listening, |mut listening| async move {
        listening.next().await.map(|event| (Ok(event), listening))
    });
    // A pattern that may be read can match channels that may not.
    let events = events.filter(move |event: &Result<EventReceive, Status>| {
        let readable =
            |event: &EventReceive| caller.can(Action::Read, Resource::Events, &subscribe.client_id, &event.channel);
        std::future::ready(event.as_ref().map_or(true, readable))
    });
    Ok(Box::pin(events.take_until(shared.stopping.clone().cancelled_owned())))
}

/// Events are taken one by one as the connection takes them: what waits for a slow subscriber waits on disk, and what it was not
/// sent is not counted as delivered.
async fn read(shared: &Arc<Shared>, caller: &Caller, subscribe: &Subscribe) -> Result<Answers<EventReceive>, Refusal> {
    caller.may(Action::Read, Resource::EventsStore, &subscribe.client_id, &subscribe.channel)?;
    let reader = shared.logs.subscribe(subscribe).await?;
    let events = futures_util::stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next().await {
            Ok(event) => Some((Ok(event), Some(reader))),
            Err(cause) => Some((Err(Refusal::from(cause).status()), None)),
        }
    });
    Ok(Box::pin(events.take_until(shared.stopping.clone().cancelled_owned())))
}

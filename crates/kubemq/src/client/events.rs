//! Events: those that are not kept and reach who is there at most once, and those that are stored under sequence numbers.

use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use polymq_core::{Address, Completion, Message, Result};
use polymq_kubemq_proto::{
    Event, EventReceive, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};

use super::{
    KubeMq, check_name,
    feed::{Call, Feed},
};
use crate::{
    config::Topics,
    convert::Wire,
    error::{self, Effect},
    names,
    outbox::Outbox,
    topology::request_id,
};

/// Which stored events a subscription begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartAt {
    /// Those stored from now on.
    New,
    /// The first that is kept.
    First,
    /// The last that is kept.
    Last,
    /// This sequence; 1 or more.
    Sequence(u64),
    /// The first stored at this time or after.
    Time(SystemTime),
    /// The first stored no longer ago than this; whole seconds, 1 or more.
    Ago(Duration),
}

impl StartAt {
    /// The position and its value, in the protocol's numbers.
    fn native(self) -> Result<(EventsStoreType, i64)> {
        let not_valid = |what: String| error::invalid(format!("{what}, so there is no such place to start at"));
        let positive = |value: i64| (value > 0).then_some(value);
        Ok(match self {
            Self::New => (EventsStoreType::StartNewOnly, 0),
            Self::First => (EventsStoreType::StartFromFirst, 0),
            Self::Last => (EventsStoreType::StartFromLast, 0),
            Self::Sequence(sequence) => {
                let value = i64::try_from(sequence).ok().and_then(positive);
                let value = value.ok_or_else(|| not_valid(format!("sequences begin with 1, not {sequence}")));
                (EventsStoreType::StartAtSequence, value?)
            }
            Self::Time(time) => {
                let nanos = time.duration_since(SystemTime::UNIX_EPOCH).ok();
                let value = nanos.and_then(|nanos| i64::try_from(nanos.as_nanos()).ok()).and_then(positive);
                let value = value.ok_or_else(|| not_valid(format!("{time:?} is not between 1970 and 2262")));
                (EventsStoreType::StartAtTime, value?)
            }
            Self::Ago(time) => {
                let value = i64::try_from(time.as_secs()).ok().and_then(positive).filter(|_| time.subsec_nanos() == 0);
                let value = value.ok_or_else(|| not_valid(format!("{time:?} is not whole seconds, 1 s or more")));
                (EventsStoreType::StartAtTimeDelta, value?)
            }
        })
    }
}

/// A subscription to events; dropped, it has ended, and no other one with it.
#[derive(Debug)]
pub struct Events {
    feed: Feed<EventReceive>,
    /// Whether it goes on after what was returned last.
    resumes: bool,
}

impl KubeMq {
    /// Sends an event that is not kept. Who is not subscribed at this moment does not get it, and the broker accepts it even
    /// if nobody is: at most once.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for the name, and what the broker says.
    pub async fn send_event(&self, channel: &str, message: &Message) -> Result<()> {
        self.send_one(self.event(channel, message, false)?).await
    }

    /// Sends an event that is stored; returns when it is.
    ///
    /// # Errors
    /// As [`send_event`](Self::send_event); after
    /// [`ErrorKind::UnknownOutcome`](polymq_core::ErrorKind::UnknownOutcome) it may be stored or not.
    pub async fn store_event(&self, channel: &str, message: &Message) -> Result<()> {
        self.send_one(self.event(channel, message, true)?).await
    }

    /// As [`send_event`](Self::send_event), over one long stream: handed over in the order of these calls, which do not wait.
    /// What is returned completes when the event is on its way; KubeMQ does not answer it.
    pub fn stream_event(&self, channel: &str, message: &Message) -> Completion<()> {
        let outbox = self.plain.get_or_init(|| Outbox::start(self.link.link()));
        match self.event(channel, message, false) {
            Ok(event) => outbox.hand_over(event),
            Err(error) => Completion::ready(Err(error)),
        }
    }

    /// As [`store_event`](Self::store_event), over one long stream: stored in the order of these calls, which do not wait.
    /// What is returned completes when the event is stored; awaiting some at times bounds how many are on their way.
    pub fn stream_stored(&self, channel: &str, message: &Message) -> Completion<()> {
        let outbox = self.stored.get_or_init(|| Outbox::start(self.link.link()));
        match self.event(channel, message, true) {
            Ok(event) => outbox.hand_over(event),
            Err(error) => Completion::ready(Err(error)),
        }
    }

    /// Subscribes to events that are not kept: a channel, or a pattern with `*` for one part of a name between dots and `>` at its
    /// end for the others. Members of a group share what they match; without one (empty), everything comes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for names, and what the broker says.
    pub async fn subscribe_events(&self, pattern: &str, group: &str) -> Result<Events> {
        names::check(&Address::topic(pattern), Topics::Events)?;
        let subscribe = Subscribe {
            subscribe_type_data: SubscribeType::Events.into(),
            client_id: self.link.client_id.clone(),
            channel: pattern.to_owned(),
            group: checked_group(group)?,
            ..Subscribe::default()
        };
        Ok(Events { feed: Feed::start(self.link.link(), subscribe, SUBSCRIBE).await?, resumes: false })
    }

    /// Subscribes to stored events, from a place on. Without a group (empty), this place counts each time, and when a connection
    /// was lost the subscription goes on after what was returned last; one of new events that has returned none begins again up to
    /// two seconds before it did, so that none is missed. A group has one place, kept by the server as what
    /// was *delivered*: `start` counts for its first member only, and what was delivered to a connection that is lost does
    /// not come again. Groups of a `Bus` go on after what was handled.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for names and the start, and what the broker says.
    pub async fn subscribe_stored(&self, channel: &str, group: &str, start: StartAt) -> Result<Events> {
        check_name(channel)?;
        let (place, value) = start.native()?;
        let subscribe = Subscribe {
            subscribe_type_data: SubscribeType::EventsStore.into(),
            // The server goes on where a client was that it knows; this one has seen nothing.
            client_id: format!("{}-{}", self.link.client_id, request_id()),
            channel: channel.to_owned(),
            group: checked_group(group)?,
            events_store_type_data: place.into(),
            events_store_type_value: value,
        };
        let mut feed = Feed::start(self.link.link(), subscribe, SUBSCRIBE).await?;
        let resumes = group.is_empty();
        if resumes {
            feed.renamed = Some(self.link.client_id.clone());
        }
        Ok(Events { feed, resumes })
    }

    fn event(&self, channel: &str, message: &Message, store: bool) -> Result<Event> {
        check_name(channel)?;
        Ok(Wire::of(message).event(channel, &self.link.client_id, store))
    }

    async fn send_one(&self, event: Event) -> Result<()> {
        let live = self.link.live_soon("send").await?;
        let mut client = live.client.clone();
        let limit = self.link.config.request_timeout;
        let sent = self.link.call(&live, "send", Effect::Once, limit, client.send_event(event)).await?;
        if sent.sent { Ok(()) } else { Err(error::refused("send", &sent.error)) }
    }
}

impl Events {
    /// The next event, waited for, through lost connections too. Events that are not kept are missed while there is none.
    /// Nothing is lost when this future is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`](polymq_core::ErrorKind::Closed) when the client was dropped,
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when it gave up reconnecting, and what the broker refuses
    /// for good.
    pub async fn next(&mut self) -> Result<EventReceive> {
        let event = self.feed.next().await?;
        if self.resumes {
            let feed = &mut self.feed;
            feed.subscribe.set_events_store_type_data(EventsStoreType::StartAtSequence);
            feed.subscribe.events_store_type_value = (event.sequence + 1).cast_signed();
        }
        Ok(event)
    }
}

const SUBSCRIBE: Call<EventReceive> =
    |mut client, subscribe| async move { client.subscribe_to_events(subscribe).await }.boxed();

/// A group's name, or none.
pub(super) fn checked_group(group: &str) -> Result<String> {
    if !group.is_empty() {
        names::check_group(group)?;
    }
    Ok(group.to_owned())
}

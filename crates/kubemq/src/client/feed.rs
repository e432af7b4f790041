//! What a subscription gives, over as many connections as it takes. There is no task: who drops it has ended it.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::BoxFuture};
use polymq_core::{ErrorKind, Result};
use polymq_kubemq_proto::{Subscribe, subscribe::EventsStoreType};
use tokio::time::{Instant, sleep};
use tonic::{Response, Status, Streaming};

use crate::{
    error::{self, Effect, native},
    link::{Items, Link, Live},
    listener::new_since,
    topology::request_id,
    transport::Client,
};

/// Wait after a subscription that was refused.
const PAUSE: Duration = Duration::from_secs(1);

/// The call that subscribes.
pub(super) type Call<T> =
    fn(Client, Subscribe) -> BoxFuture<'static, std::result::Result<Response<Streaming<T>>, Status>>;

pub(super) struct Feed<T> {
    pub(super) link: Arc<Link>,
    /// How to subscribe, and how again when the connection was lost.
    pub(super) subscribe: Subscribe,
    /// The client id of each time is this and something random: of stored events, the server goes on where it was with a
    /// client that it knows, and counts what was delivered, not what came here.
    pub(super) renamed: Option<String>,
    /// When the subscription was asked for that was there first.
    began: Option<Instant>,
    call: Call<T>,
    open: Option<(Live, Items<T>)>,
}

impl<T: Send + 'static> Feed<T> {
    /// Subscribes; returns when the server has the subscription.
    pub(super) async fn start(link: Arc<Link>, subscribe: Subscribe, call: Call<T>) -> Result<Self> {
        let live = link.live_soon("subscribe").await?;
        let mut feed = Self { link, subscribe, renamed: None, began: None, call, open: None };
        feed.open(live).await?;
        Ok(feed)
    }

    async fn open(&mut self, live: Live) -> Result<()> {
        if let Some(client_id) = &self.renamed {
            self.subscribe.client_id = format!("{client_id}-{}", request_id());
        }
        let mut subscribe = self.subscribe.clone();
        if self.renamed.is_some() && subscribe.events_store_type_data() == EventsStoreType::StartNewOnly {
            let (place, value) = new_since(self.began);
            subscribe.set_events_store_type_data(place);
            subscribe.events_store_type_value = value;
        }
        let asked = Instant::now();
        let opening = (self.call)(live.client.clone(), subscribe);
        let items = self.link.subscribe(&live, "subscribe", opening).await?;
        self.began.get_or_insert(asked);
        self.open = Some((live, items));
        Ok(())
    }

    /// The next one. Subscribes again when the connection was lost, and when the server refuses for now; nothing is lost when
    /// this future is dropped.
    pub(super) async fn next(&mut self) -> Result<T> {
        loop {
            let error = match &mut self.open {
                Some((live, items)) => {
                    let error = tokio::select! {
                        item = items.next() => match item {
                            Some(Ok(item)) => {
                                self.link.answered();
                                return Ok(item);
                            }
                            Some(Err(status)) => native("receive", Effect::Idempotent, status),
                            None => error::disconnected("receive", "the broker ended the subscription"),
                        },
                        () = self.link.over(live) => error::disconnected("receive", &self.link.reason()),
                    };
                    self.link.failed(live, &error);
                    self.open = None;
                    error
                }
                None => {
                    let live = self.link.live().await?;
                    match self.open(live).await {
                        Ok(()) => continue,
                        Err(error) => error,
                    }
                }
            };
            if error::is_of_deleting(&error) && self.subscribe.events_store_type_data() != EventsStoreType::Undefined {
                // Whatever the channel has when it is made anew is new.
                self.subscribe.set_events_store_type_data(EventsStoreType::StartFromFirst);
                self.subscribe.events_store_type_value = 0;
            }
            if error::is_final(error.kind()) {
                return Err(error);
            }
            if error.kind() != ErrorKind::Disconnected {
                tracing::warn!(channel = self.subscribe.channel, %error, "cannot subscribe, trying again");
                sleep(PAUSE).await;
            }
        }
    }
}

impl<T> fmt::Debug for Feed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed")
            .field("channel", &self.subscribe.channel)
            .field("group", &self.subscribe.group)
            .field("open", &self.open.is_some())
            .finish_non_exhaustive()
    }
}

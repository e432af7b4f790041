//! How a scenario is connected.

use std::{sync::Arc, time::Duration};

use polymq_core::Bus;
use tokio::sync::Notify;

use super::states::States;
use crate::{Cx, Proxy, cx::CONNECTING, try_eventually};

/// How a scenario differs from the usual one.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Where it connects.
    pub(super) url: String,
    /// Where its sender connects, if that is a connection of its own.
    pub(super) sender: Option<String>,
    /// Settings, besides those under which a lost connection is looked for again soon.
    pub(super) settings: Vec<(String, String)>,
    /// The time-out of one send.
    pub(super) one_send: Duration,
    /// How many sends run at a time.
    pub(super) senders: usize,
    /// How long a message is sent again and again until it must be accepted; by default twice the harness's recovery.
    pub(super) hope: Option<Duration>,
    /// What stands before the broker, if anything does.
    pub(super) proxy: Option<Arc<Proxy>>,
    /// The first handler of this message goes on when it is told.
    pub(super) slow: Option<(&'static str, Arc<Notify>)>,
}

impl Plan {
    /// With time for declarations, where one that takes longer than `usual` says would be told as a lost connection.
    pub(super) fn patient(mut self, cx: &Cx) -> Self {
        if cx.harness().backend().keys().iter().any(|key| key.name == "connect_timeout") {
            self.settings.push(("connect_timeout".into(), "60s".into()));
        }
        self
    }

    pub(super) fn at(url: String) -> Self {
        let one_send = Duration::from_secs(5);
        Self { url, sender: None, settings: Vec::new(), one_send, senders: 8, hope: None, proxy: None, slow: None }
    }

    /// A proxy before the broker, and a plan that goes through it.
    pub(super) async fn through_proxy(cx: &Cx) -> (Arc<Proxy>, Self) {
        let proxy = Proxy::start(cx.broker().address()).await.expect("a proxy");
        let url = cx.harness().url(Some(proxy.address()));
        let proxy = Arc::new(proxy);
        (Arc::clone(&proxy), Self { proxy: Some(proxy), ..Self::at(url) })
    }
}

/// A bus as the plan says, at this address.
pub(super) async fn connect(cx: &Cx, plan: &Plan, url: &str, states: Option<&States>) -> Bus {
    // What is short for the sake of connecting again may be too short for a first time on a busy machine.
    let connected = try_eventually(cx.harness().recovery(), || try_to_connect(cx, plan, url, states)).await;
    connected.unwrap_or_else(|why| panic!("{CONNECTING}{why}"))
}

async fn try_to_connect(cx: &Cx, plan: &Plan, url: &str, states: Option<&States>) -> Result<Bus, String> {
    let mut builder = cx.builder_to(url.to_owned());
    if let Some(states) = states {
        builder = states.watched(builder);
    }
    for (key, value) in usual(cx).iter().chain(&plan.settings) {
        builder = builder.with(key, value);
    }
    builder.connect().await.map_err(|error| error.to_string())
}

/// Settings under which a lost connection is looked for again soon, as far as the backend has them.
fn usual(cx: &Cx) -> Vec<(String, String)> {
    let known = cx.harness().backend();
    [("reconnect_max", "1s"), ("connect_timeout", "3s"), ("operation_timeout", "10s")]
        .into_iter()
        .filter(|(key, _)| known.keys().iter().any(|known| known.name == *key))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

//! Whether a client still knows any broker. One that knows none never connects again, and another one has to take over.
//!
//! librdkafka forgets brokers that are not in a cluster's metadata any more, and goes back to `bootstrap.servers` when
//! none is left. A broker of KRaft that is being stopped tells of no broker at all. When that answer and the end of the last
//! connection come at the same moment, librdkafka 2.12 takes its way back for done: it has nobody left to ask, for good.
//! It says so in its statistics and nowhere else.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde::Deserialize;

/// How often a client tells what brokers it knows.
pub(crate) const TOLD_EVERY: Duration = Duration::from_secs(5);

/// How often in a row it has to know none: once is the moment before it goes back.
const FOR_GOOD: u32 = 2;

/// What a client knows.
#[derive(Debug, Default)]
pub(crate) struct Brokers {
    /// How often in a row it has told of none.
    without: AtomicU32,
}

/// The statistics of librdkafka, as far as they are looked at.
#[derive(Deserialize)]
struct Statistics {
    brokers: HashMap<String, Broker>,
}

#[derive(Deserialize)]
struct Broker {
    /// `configured` and `learned` are brokers of the cluster; others are names for one of them.
    source: String,
}

impl Brokers {
    /// Takes in what a client tells of itself.
    pub(crate) fn told(&self, statistics: &[u8]) {
        match serde_json::from_slice::<Statistics>(statistics) {
            Ok(told) if !told.brokers.values().any(Broker::is_real) => {
                self.without.fetch_add(1, Ordering::AcqRel);
            }
            Ok(_) => self.without.store(0, Ordering::Release),
            Err(error) => tracing::debug!(%error, "statistics that cannot be read"),
        }
    }

    /// Whether there is nobody left to connect to, ever.
    pub(crate) fn are_gone(&self) -> bool {
        self.without.load(Ordering::Acquire) >= FOR_GOOD
    }

    /// Nobody could take over: it is told again.
    pub(crate) fn ask_again(&self) {
        self.without.store(0, Ordering::Release);
    }
}

impl Broker {
    fn is_real(&self) -> bool {
        matches!(&*self.source, "configured" | "learned")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: &str = r#"{ "name": "polymq#consumer-2", "brokers":{ "GroupCoordinator": { "nodeid":-1, "source":"logical" } }, "topics":{} }"#;
    const ONE: &str = r#"{ "brokers":{ "GroupCoordinator": { "source":"logical" } , "localhost:9092/1": { "source":"learned", "state":"DOWN" } } }"#;

    #[test]
    fn a_client_is_given_up_when_it_knows_no_broker_twice() {
        let brokers = Brokers::default();
        for (told, gone) in [(NONE, false), (ONE, false), (NONE, false), ("{", false), (NONE, true), (ONE, false)] {
            brokers.told(told.as_bytes());
            assert_eq!(brokers.are_gone(), gone, "{told}");
        }
    }
}

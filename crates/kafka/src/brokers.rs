//! Whether a client can still connect. One that knows no broker never does, nor one whose password is of before: another one
//! has to take over.
//!
//! librdkafka forgets brokers that are not in a cluster's metadata any more, and goes back to `bootstrap.servers` when
//! none is left. A broker of KRaft that is being stopped tells of no broker at all. When that answer and the end of the last
//! connection come at the same moment, librdkafka 2.12 takes its way back for done: it has nobody left to ask, for good.
//! It says so in its statistics and nowhere else.
//!
//! A client keeps the password that it was made with, for all connections to come.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

use polymq_core::{Result, Secret};
use rdkafka::types::RDKafkaErrorCode as Code;
use serde::Deserialize;

use crate::config::KafkaConfig;

/// How often a client tells what brokers it knows.
pub(crate) const TOLD_EVERY: Duration = Duration::from_secs(5);

/// How often in a row it has to know none: once is the moment before it goes back.
const FOR_GOOD: u32 = 2;

/// What a client knows.
#[derive(Debug, Default)]
pub(crate) struct Brokers {
    /// How often in a row it has told of none.
    without: AtomicU32,
    /// Where its password is from, when that may change.
    login: Option<Login>,
}

#[derive(Debug)]
struct Login {
    file: PathBuf,
    /// What was in it when the client was made.
    pass: Secret,
    /// Not accepted any more.
    refused: AtomicBool,
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
    /// Of a client that is made after this.
    pub(crate) fn of(config: &KafkaConfig) -> Result<Self> {
        let login = match (&config.pass_file, config.endpoint()?.pass) {
            (Some(file), Some(pass)) => Some(Login { file: file.clone(), pass, refused: AtomicBool::new(false) }),
            _ => None,
        };
        Ok(Self { without: AtomicU32::new(0), login })
    }

    /// Takes in what a client complains about.
    pub(crate) fn observe(&self, code: Option<Code>) {
        if let (Some(login), Some(Code::Authentication | Code::SaslAuthenticationFailed)) = (&self.login, code) {
            login.refused.store(true, Ordering::Release);
        }
    }

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

    /// Whether this client has nobody left to connect to, ever; or would be let in with the password that is in the file now.
    pub(crate) fn are_gone(&self) -> bool {
        self.without.load(Ordering::Acquire) >= FOR_GOOD || self.login.as_ref().is_some_and(Login::is_of_before)
    }

    /// Nobody could take over: it is told again.
    pub(crate) fn ask_again(&self) {
        self.without.store(0, Ordering::Release);
        if let Some(login) = &self.login {
            login.refused.store(false, Ordering::Release);
        }
    }
}

impl Login {
    fn is_of_before(&self) -> bool {
        // A file that is being written is read again when the next attempt is refused.
        self.refused.swap(false, Ordering::AcqRel)
            && Secret::read("pass_file", &self.file).is_ok_and(|now| {
                let changed = now.expose() != self.pass.expose();
                // Asked again until another client has taken over.
                self.refused.fetch_or(changed, Ordering::AcqRel);
                changed
            })
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

//! The suite of polymq-testkit on a real Apache Kafka.

mod common;

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use async_trait::async_trait;
use common::{bare::Bare, relay::Relays};
use polymq_core::{Address, Backend};
use polymq_kafka::KafkaBackend;
use polymq_testkit::{
    BareClient, Broker, BrokerControl, Denied, Harness, Heartbeat, Passwords, Suite, Switch, Tool, Use,
};

#[derive(Debug)]
struct Kafka {
    /// The time after which the broker gives the messages of a killed consumer to another one, in seconds.
    session: u8,
    broker: Broker,
    bare: Bare,
    relays: Relays,
}

impl Kafka {
    fn start(purpose: Use) -> Self {
        let broker = Broker::kafka_with(&["--also", "rotating:unset"]);
        let bare = Bare { servers: broker.address().to_string() };
        // The shortest that the broker allows where it is killed: a member that comes back after that may wait for it several times.
        let session = if purpose == Use::Kill { 6 } else { 10 };
        Self { session, relays: Relays::new(broker.address()), bare, broker }
    }

    fn url_of(&self, login: &str, at: SocketAddr) -> String {
        format!("kafka://{login}@{at}?session_timeout={}s", self.session)
    }
}

#[async_trait]
impl Passwords for Kafka {
    fn address(&self) -> SocketAddr {
        self.broker.address()
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        self.url_of(&format!("rotating:{password}"), self.relays.before(at))
    }

    async fn set(&self, password: &str) {
        self.broker.restart_with("--also", &format!("rotating:{password}")).await;
    }
}

impl Harness for Kafka {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(KafkaBackend)
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        let at = at.map_or(self.broker.address(), |proxy| self.relays.before(proxy));
        self.url_of("admin:secret", at)
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.broker)
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        Some(&self.bare)
    }

    fn wrong_password(&self) -> Option<String> {
        Some(self.url_of("admin:not-the-password", self.broker.address()))
    }

    fn denied(&self) -> Option<Denied> {
        let url = self.url_of("limited:limited", self.broker.address());
        Some(Denied { url, address: Address::queue("forbidden"), consumers_are_told: true })
    }

    fn deliveries_outlive_connections(&self) -> bool {
        // Membership in the group does, for the session's time.
        true
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(self)
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("Kafka has no alarm: without room on its disk it ends")
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Err("Kafka throttles by answering late, and its client library waits: a slow answer, not a reply")
    }

    fn recovery(&self) -> Duration {
        // Several sessions, on a machine that is busy.
        Duration::from_secs(75)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: silence of twice the heartbeat is a lost connection.
        Some(Heartbeat { settings: vec![("heartbeat".into(), "2s".into())], bound: Duration::from_secs(4) })
    }
}

fn main() -> ExitCode {
    Suite::new("kafka", Kafka::start).and_mutants_of(&["T4_start"]).main()
}

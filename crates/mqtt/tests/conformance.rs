//! The suite of polymq-testkit on a real Mosquitto.

use std::{fs, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{Address, Backend};
use polymq_mqtt::{
    MqttBackend,
    rumqttc::v5::{
        AsyncClient, Event, EventLoop, Incoming, MqttOptions,
        mqttbytes::{
            QoS,
            v5::{Publish, PublishProperties},
        },
    },
};
use polymq_testkit::{
    BareClient, BareMessage, BareReceiver, Broker, BrokerControl, Deletion, Denied, Harness, Heartbeat, Passwords,
    Suite, Switch, Tool, Use,
};

/// Nobody may send to `forbidden`; everything else is allowed.
const RULES: &str = "user polymq\ntopic readwrite #\ntopic readwrite $polymq/#\ntopic deny forbidden\n\
                     user rotating\ntopic readwrite #\ntopic readwrite $polymq/#\n";

#[derive(Debug)]
struct Mosquitto {
    broker: Broker,
    bare: Bare,
    _rules: tempfile::TempDir,
}

impl Mosquitto {
    fn start(purpose: Use) -> Self {
        let rules = tempfile::tempdir().expect("a directory");
        let file = rules.path().join("acl");
        fs::write(&file, RULES).expect("written");
        let file = file.display().to_string();
        let mut options =
            vec!["--user", "polymq", "--password", "secret-1", "--also", "rotating:unset", "--acl", &file];
        if purpose == Use::Shared {
            options.push("--volatile");
        }
        let broker = Broker::mosquitto(&options);
        let bare = Bare { address: broker.address() };
        Self { broker, bare, _rules: rules }
    }
}

#[async_trait]
impl Passwords for Mosquitto {
    fn address(&self) -> SocketAddr {
        self.broker.address()
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        format!("mqtt://rotating:{password}@{at}")
    }

    async fn set(&self, password: &str) {
        self.broker.restart_with("--also", &format!("rotating:{password}")).await;
    }
}

impl Harness for Mosquitto {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(MqttBackend)
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        format!("mqtt://polymq:secret-1@{}", at.unwrap_or(self.broker.address()))
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.broker)
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        Some(&self.bare)
    }

    fn wrong_password(&self) -> Option<String> {
        Some(format!("mqtt://polymq:not-the-password@{}", self.broker.address()))
    }

    fn denied(&self) -> Option<Denied> {
        Some(Denied { url: Harness::url(self, None), address: Address::queue("forbidden"), consumers_are_told: false })
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(self)
    }

    fn deletes_in_use(&self) -> Tool<'_, Deletion> {
        // What a queue holds is a session, which is ended by taking it over.
        Ok(&Deletion::OfConnection)
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("Mosquitto has no alarm: what it has no room for it refuses or drops")
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Err("MQTT has no throttling reply: a client may have as many unconfirmed as it was told, and waits")
    }

    fn write_lag(&self) -> Duration {
        // With autosave_on_changes the database is written after the answers of one turn of the broker's loop.
        Duration::from_secs(1)
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        vec![
            (Address::queue("$SYS/orders"), "starts with $"),
            (Address::queue("orders/+"), "holds a wildcard"),
            (Address::queue("orders/#"), "holds a wildcard"),
            (Address::topic("orders/new+"), "misplaced wildcard"),
            (Address::topic("#/orders"), "misplaced wildcard"),
            (Address::queue("orders\u{fffe}"), "does not allow"),
        ]
    }

    fn time_outs(&self) -> Vec<&'static str> {
        vec!["connect_timeout", "operation_timeout"]
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: a connection that is silent for one and a half of keep_alive is given up.
        Some(Heartbeat { settings: vec![("keep_alive".into(), "4s".into())], bound: Duration::from_secs(6) })
    }
}

/// rumqttc alone.
#[derive(Debug)]
struct Bare {
    address: SocketAddr,
}

impl Bare {
    fn connect(&self) -> (AsyncClient, EventLoop) {
        let id = format!("bare-{:x}", fastrand::u64(..));
        let mut options = MqttOptions::new(id, self.address.ip().to_string(), self.address.port());
        options.set_credentials("polymq", "secret-1").set_keep_alive(Duration::from_secs(30));
        options.set_connection_timeout(60);
        AsyncClient::new(options, 10)
    }
}

#[async_trait]
impl BareClient for Bare {
    async fn send(&self, queue: &str, message: BareMessage) {
        let (client, mut events) = self.connect();
        let properties = to_mqtt(&message);
        client.publish_with_properties(queue, QoS::AtLeastOnce, false, message.body, properties).await.expect("sent");
        loop {
            match events.poll().await.expect("connected") {
                Event::Incoming(Incoming::PubAck(_)) => return,
                _ => continue,
            }
        }
    }

    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver> {
        let (client, mut events) = self.connect();
        client.subscribe(queue, QoS::AtLeastOnce).await.expect("subscribed");
        loop {
            match events.poll().await.expect("connected") {
                Event::Incoming(Incoming::SubAck(_)) => break,
                _ => continue,
            }
        }
        Box::new(BareTopic { _client: client, events })
    }

    fn golden(&self) -> BareMessage {
        BareMessage::new(
            b"{\"id\": 7}",
            [
                ("content_type", "application/json"),
                ("correlation_data", "saga-1"),
                ("payload_format_indicator", "1"),
                ("response_topic", "replies"),
                ("user dataversion", "2"),
                ("user id", "0190a0a0-0000-7000-8000-000000000007"),
                ("user partitionkey", "customer-7"),
                ("user tenant", "acme é"),
                ("user time", "2023-11-14T22:13:20.123000000Z"),
                ("user type", "order.created"),
            ],
        )
    }

    fn foreign(&self) -> BareMessage {
        BareMessage::new(b"{\"id\": 1}", [("content_type", "application/json"), ("user tenant", "acme")])
    }
}

struct BareTopic {
    _client: AsyncClient,
    events: EventLoop,
}

impl std::fmt::Debug for BareTopic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BareTopic")
    }
}

#[async_trait]
impl BareReceiver for BareTopic {
    async fn next(&mut self, wait: Duration) -> Option<BareMessage> {
        let next = async {
            loop {
                if let Event::Incoming(Incoming::Publish(publish)) = self.events.poll().await.expect("connected") {
                    return from_mqtt(publish);
                }
            }
        };
        tokio::time::timeout(wait, next).await.ok()
    }
}

fn to_mqtt(message: &BareMessage) -> PublishProperties {
    let mut properties = PublishProperties::default();
    for (name, value) in &message.properties {
        match name.as_str() {
            "content_type" => properties.content_type = Some(value.clone()),
            "correlation_data" => properties.correlation_data = Some(value.clone().into_bytes().into()),
            "payload_format_indicator" => properties.payload_format_indicator = value.parse().ok(),
            "response_topic" => properties.response_topic = Some(value.clone()),
            name => {
                let name = name.strip_prefix("user ").unwrap_or_else(|| panic!("no property {name}"));
                properties.user_properties.push((name.to_owned(), value.clone()));
            }
        }
    }
    properties
}

fn from_mqtt(publish: Publish) -> BareMessage {
    let mut message = BareMessage { body: publish.payload.to_vec(), ..BareMessage::default() };
    let Some(properties) = publish.properties else { return message };
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            message.properties.insert(name.to_owned(), value);
        }
    };
    put("content_type", properties.content_type);
    put("correlation_data", properties.correlation_data.map(|data| String::from_utf8_lossy(&data).into_owned()));
    put("payload_format_indicator", properties.payload_format_indicator.map(|value| value.to_string()));
    put("message_expiry_interval", properties.message_expiry_interval.map(|value| value.to_string()));
    put("response_topic", properties.response_topic);
    for (name, value) in properties.user_properties {
        put(&format!("user {name}"), Some(value));
    }
    message
}

fn main() -> ExitCode {
    Suite::new("mqtt", Mosquitto::start).and_mutants().main()
}

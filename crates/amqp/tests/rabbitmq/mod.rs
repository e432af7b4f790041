//! RabbitMQ as the suite of polymq-testkit sees it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use polymq_amqp::AmqpBackend;
use polymq_core::{Address, Backend, Capabilities, RedeliveryOrder};
use polymq_testkit::{
    BareClient, BareMessage, BareReceiver, Broker, BrokerControl, Deletion, Denied, Harness, Heartbeat, Passwords,
    Switch, Tool, eventually,
    twist::{Twist, Twisted},
};

#[derive(Debug)]
pub(crate) struct RabbitMq {
    broker: Broker,
    bare: Bare,
    /// What new queues are: classic or quorum.
    queue_type: &'static str,
}

impl RabbitMq {
    pub(crate) fn start(queue_type: &'static str) -> Self {
        let broker = Broker::rabbitmq();
        let management = broker.management().expect("started with it");
        // A user that may use queues whose names begin with "allowed", and no others.
        put(management, "/api/users/limited", r#"{"password": "limited", "tags": ""}"#);
        let permissions = r#"{"configure": "^allowed", "write": "^allowed", "read": "^allowed"}"#;
        put(management, "/api/permissions/%2F/limited", permissions);
        let bare = Bare { url: format!("amqp://guest:guest@{}", broker.address()) };
        Self { broker, bare, queue_type }
    }

    fn is_quorum(&self) -> bool {
        self.queue_type == "quorum"
    }
}

/// What `queue_type=quorum` changes: the backend itself declares what it does without settings.
#[derive(Debug)]
struct Quorum;

impl Twist for Quorum {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { redelivery: RedeliveryOrder::Any, ..own }
    }
}

#[async_trait]
impl Passwords for RabbitMq {
    fn address(&self) -> SocketAddr {
        self.broker.address()
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        format!("amqp://rotating:{password}@{at}?queue_type={}", self.queue_type)
    }

    async fn set(&self, password: &str) {
        let management = self.broker.management().expect("started with it");
        tokio::task::block_in_place(|| {
            put(management, "/api/users/rotating", &format!(r#"{{"password": "{password}", "tags": ""}}"#));
            let all = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
            put(management, "/api/permissions/%2F/rotating", all);
        });
    }
}

/// The memory alarm.
#[async_trait]
impl Switch for RabbitMq {
    fn url(&self) -> String {
        Harness::url(self, None)
    }

    async fn turn(&self, on: bool) {
        self.broker.alarm(on).await;
    }
}

/// One request to the management interface.
fn put(management: SocketAddr, path: &str, body: &str) {
    let mut stream = TcpStream::connect(management).expect("the management interface listens");
    let request = format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 20"), "{path}: {answer}");
}

impl Harness for RabbitMq {
    fn backend(&self) -> Arc<dyn Backend> {
        let backend: Arc<dyn Backend> = Arc::new(AmqpBackend);
        if self.is_quorum() { Twisted::around(backend, Arc::new(Quorum)) } else { backend }
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        format!("amqp://guest:guest@{}?queue_type={}", at.unwrap_or(self.broker.address()), self.queue_type)
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.broker)
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        Some(&self.bare)
    }

    fn wrong_password(&self) -> Option<String> {
        Some(format!("amqp://guest:not-the-password@{}", self.broker.address()))
    }

    fn denied(&self) -> Option<Denied> {
        let url = format!("amqp://limited:limited@{}", self.broker.address());
        Some(Denied { url, address: Address::queue("forbidden"), consumers_are_told: true })
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(self)
    }

    fn deletes_in_use(&self) -> Tool<'_, Deletion> {
        match self.is_quorum() {
            true => Err("RabbitMQ 3.10 forgets the consumers of a quorum queue that is declared again at once"),
            false => Ok(&Deletion::OfChannel),
        }
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Ok(self)
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Err("AMQP has no throttling reply: RabbitMQ blocks the connection, as its alarm does")
    }

    /// A passive declaration asks for no permission.
    fn anybody_may_look(&self) -> bool {
        true
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        vec![
            (Address::queue("amq.mine"), "starts with amq."),
            (Address::queue("orders@audit"), "holds an @"),
            (Address::topic("orders@audit"), "holds an @"),
        ]
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: silence of twice the heartbeat ends a connection.
        Some(Heartbeat { settings: vec![("heartbeat".into(), "2s".into())], bound: Duration::from_secs(4) })
    }
}

/// lapin alone.
#[derive(Debug)]
struct Bare {
    url: String,
}

impl Bare {
    async fn channel(&self) -> (Connection, Channel) {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await.expect("connect");
        let channel = connection.create_channel().await.expect("a channel");
        (connection, channel)
    }
}

#[async_trait]
impl BareClient for Bare {
    async fn send(&self, queue: &str, message: BareMessage) {
        let (connection, channel) = self.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirm = channel
            .basic_publish("".into(), queue.into(), options, &message.body, to_amqp(&message))
            .await
            .expect("sent");
        let confirmation = confirm.await.expect("confirmed");
        assert!(confirmation.is_ack() && confirmation.take_message().is_none(), "the queue exists");
        connection.close(200, "done".into()).await.expect("close");
    }

    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver> {
        let (connection, channel) = self.channel().await;
        Box::new(BareQueue { _connection: connection, channel, queue: queue.to_owned() })
    }

    fn golden(&self) -> BareMessage {
        BareMessage::new(
            b"{\"id\": 7}",
            [
                ("content_type", "application/json"),
                ("correlation_id", "saga-1"),
                ("delivery_mode", "2"),
                ("header cloudEvents:dataversion", "2"),
                ("header cloudEvents:partitionkey", "customer-7"),
                ("header cloudEvents:time", "2023-11-14T22:13:20.123000000Z"),
                ("header tenant", "acme é"),
                ("message_id", "0190a0a0-0000-7000-8000-000000000007"),
                ("reply_to", "replies"),
                ("timestamp", "1700000000"),
                ("type", "order.created"),
            ],
        )
    }

    fn foreign(&self) -> BareMessage {
        BareMessage::new(b"{\"id\": 1}", [("content_type", "application/json"), ("header tenant", "acme")])
    }
}

#[derive(Debug)]
struct BareQueue {
    _connection: Connection,
    channel: Channel,
    queue: String,
}

#[async_trait]
impl BareReceiver for BareQueue {
    async fn next(&mut self, wait: Duration) -> Option<BareMessage> {
        let options = BasicGetOptions { no_ack: true };
        let got = eventually(wait, || async {
            let got = self.channel.basic_get(self.queue.as_str().into(), options).await.expect("get");
            got.ok_or("the queue is empty")
        })
        .await;
        Some(from_amqp(&got.properties, got.data.clone()))
    }
}

fn to_amqp(message: &BareMessage) -> BasicProperties {
    let mut headers = FieldTable::default();
    let mut properties = BasicProperties::default();
    for (name, value) in &message.properties {
        let short = || value.as_str().into();
        properties = match name.as_str() {
            "content_type" => properties.with_content_type(short()),
            "correlation_id" => properties.with_correlation_id(short()),
            "message_id" => properties.with_message_id(short()),
            "reply_to" => properties.with_reply_to(short()),
            "type" => properties.with_type(short()),
            "delivery_mode" => properties.with_delivery_mode(value.parse().expect("a number")),
            "timestamp" => properties.with_timestamp(value.parse().expect("a number")),
            name => {
                let name = name.strip_prefix("header ").unwrap_or_else(|| panic!("no property {name}"));
                headers.insert(name.into(), AMQPValue::LongString(value.as_str().into()));
                properties
            }
        };
    }
    if headers.inner().is_empty() { properties } else { properties.with_headers(headers) }
}

fn from_amqp(properties: &BasicProperties, body: Vec<u8>) -> BareMessage {
    let mut message = BareMessage { body, ..BareMessage::default() };
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            message.properties.insert(name.to_owned(), value);
        }
    };
    put("content_type", properties.content_type().as_ref().map(ToString::to_string));
    put("content_encoding", properties.content_encoding().as_ref().map(ToString::to_string));
    put("correlation_id", properties.correlation_id().as_ref().map(ToString::to_string));
    put("message_id", properties.message_id().as_ref().map(ToString::to_string));
    put("reply_to", properties.reply_to().as_ref().map(ToString::to_string));
    put("type", properties.kind().as_ref().map(ToString::to_string));
    put("expiration", properties.expiration().as_ref().map(ToString::to_string));
    put("user_id", properties.user_id().as_ref().map(ToString::to_string));
    put("app_id", properties.app_id().as_ref().map(ToString::to_string));
    put("delivery_mode", properties.delivery_mode().as_ref().map(ToString::to_string));
    put("priority", properties.priority().as_ref().map(ToString::to_string));
    put("timestamp", properties.timestamp().as_ref().map(ToString::to_string));
    // What a quorum queue adds is no part of the message.
    let headers = properties.headers().iter().flatten().filter(|(name, _)| name.as_str() != "x-delivery-count");
    for (name, value) in headers {
        let value = match value {
            AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
            other => format!("{other:?}"),
        };
        put(&format!("header {name}"), Some(value));
    }
    message
}

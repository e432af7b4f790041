//! A broker that ends the connection of whoever does not keep to the letter of the protocol, which Mosquitto does not.

use std::time::Duration;

use polymq_core::{Address, Backend, ConsumeOptions, ErrorKind, HealthState, Message, ProduceOptions, Settings};
use polymq_mqtt::MqttBackend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(30);
const PUBLISH: u8 = 3;
const PUBREL: u8 = 6;
const SUBSCRIBE: u8 = 8;
const DISCONNECT: u8 = 14;

/// The other end of one connection, spoken by hand.
struct Peer(TcpStream);

impl Peer {
    /// Greets a client, which may have one message without an answer.
    async fn greet(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().await.expect("a client");
        let mut peer = Self(stream);
        assert_eq!(peer.read().await.0 >> 4, 1, "CONNECT comes first");
        // CONNACK: no session, success, receive maximum 1.
        peer.write(&[0x20, 6, 0, 0, 3, 0x21, 0, 1]).await;
        peer
    }

    /// The next packet: its first byte, and what follows its length.
    async fn read(&mut self) -> (u8, Vec<u8>) {
        let first = self.0.read_u8().await.expect("a packet");
        let mut length = 0_usize;
        for shift in (0..28).step_by(7) {
            let byte = self.0.read_u8().await.expect("a length");
            length |= usize::from(byte & 127) << shift;
            if byte < 128 {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).await.expect("a whole packet");
        (first, body)
    }

    /// The next packet of this type: what follows its length.
    async fn expect(&mut self, packet: u8) -> Vec<u8> {
        let (first, body) = timeout(PATIENCE, self.read()).await.expect("a packet in time");
        assert_eq!(first >> 4, packet, "{body:?}");
        body
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("written");
    }
}

/// The topic of a PUBLISH, and its packet id.
fn published(body: &[u8]) -> (String, [u8; 2]) {
    let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
    let topic = String::from_utf8_lossy(&body[2..2 + length]).into_owned();
    (topic, [body[2 + length], body[3 + length]])
}

/// The messages by which consumers agree go before all others, and not beyond what the broker takes at once.
#[tokio::test]
async fn claims_keep_to_the_receive_maximum() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let settings = Settings::from_url(&format!("mqtt://{}", listener.local_addr().expect("an address")));
    let settings = settings.expect("a URL").with("keep_alive", "600s").with("operation_timeout", "60s");
    let (connected, mut peer) = tokio::join!(MqttBackend.connect(&settings), Peer::greet(&listener));
    let bus = connected.expect("connected");
    let producer = bus.producer(&Address::topic("news"), &ProduceOptions::default()).await.expect("a producer");
    let sends: Vec<_> = ["one", "two"].map(|body| producer.send(Message::new(body))).into();
    let (topic, first) = published(&peer.expect(PUBLISH).await);
    assert_eq!(topic, "news");
    let declaring = tokio::spawn({
        let bus = std::sync::Arc::clone(&bus);
        async move { bus.declare(&Address::queue("orders"), &ConsumeOptions::default()).await }
    });
    let subscribe = peer.expect(SUBSCRIBE).await;
    peer.write(&[0x90, 4, subscribe[0], subscribe[1], 0, 0]).await;
    let more = timeout(Duration::from_millis(300), peer.read()).await;
    assert!(more.is_err(), "a second message although the broker takes one at once: {more:?}");
    // With its answer there is room: for the look and the claim, before what was sent long ago.
    peer.write(&[0x40, 2, first[0], first[1]]).await;
    for _ in ["look", "claim"] {
        let (topic, asked) = published(&peer.expect(PUBLISH).await);
        assert!(topic.ends_with("/ask"), "{topic}");
        peer.write(&[0x40, 2, asked[0], asked[1]]).await;
    }
    let (topic, second) = published(&peer.expect(PUBLISH).await);
    assert_eq!(topic, "news");
    peer.write(&[0x40, 2, second[0], second[1]]).await;
    for send in sends {
        timeout(PATIENCE, send).await.expect("in time").expect("sent");
    }
    declaring.abort();
}

/// A broker that has only received a QoS 2 message may forget it as long as it has not said that it is done.
#[tokio::test]
async fn a_qos_2_message_is_sent_when_the_broker_says_so_the_second_time() {
    for completes in [true, false] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let settings = Settings::from_url(&format!("mqtt://{}?qos=2", listener.local_addr().expect("an address")));
        let settings = settings.expect("a URL").with("keep_alive", "600s");
        let (connected, mut peer) = tokio::join!(MqttBackend.connect(&settings), Peer::greet(&listener));
        let bus = connected.expect("connected");
        let producer = bus.producer(&Address::topic("twice"), &ProduceOptions::default()).await.expect("a producer");
        let mut send = producer.send(Message::new("?"));
        let (_, id) = published(&peer.expect(PUBLISH).await);
        peer.write(&[0x50, 2, id[0], id[1]]).await;
        assert_eq!(peer.expect(PUBREL).await[..2], id);
        let early = timeout(Duration::from_millis(200), &mut send).await;
        assert!(early.is_err(), "called sent after PUBREC: {early:?}");
        if completes {
            peer.write(&[0x70, 2, id[0], id[1]]).await;
            timeout(PATIENCE, send).await.expect("in time").expect("sent");
        } else {
            drop(peer);
            let error = timeout(PATIENCE, send).await.expect("in time").expect_err("nobody knows");
            assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
        }
    }
}

/// A consumer whose session was taken over subscribes anew, which may not be allowed any more: no other try helps.
#[tokio::test]
async fn a_consumer_that_may_not_subscribe_again_is_told() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let settings = Settings::from_url(&format!("mqtt://{}", listener.local_addr().expect("an address")));
    let settings = settings.expect("a URL").with("keep_alive", "600s").with("operation_timeout", "60s");
    let (connected, _main) = tokio::join!(MqttBackend.connect(&settings), Peer::greet(&listener));
    let bus = connected.expect("connected");
    // QoS 1 the first time, "not authorized" the second.
    let session = async |answer: u8| {
        let mut peer = Peer::greet(&listener).await;
        let subscribe = peer.expect(SUBSCRIBE).await;
        peer.write(&[0x90, 4, subscribe[0], subscribe[1], 0, answer]).await;
        peer
    };
    let (topic, options) = (Address::topic("news"), ConsumeOptions::default());
    let (consumer, mut first) = tokio::join!(bus.consumer(&topic, &options), session(1));
    let mut consumer = consumer.expect("a consumer");
    // "Session taken over".
    first.write(&[0xe0, 2, 0x8e, 0]).await;
    let second = async {
        session(0x87).await.expect(DISCONNECT).await;
    };
    let mut got = Vec::new();
    let (told, ()) = tokio::join!(timeout(PATIENCE, consumer.receive(1, &mut got)), second);
    let error = told.expect("it is told").expect_err("it has ended");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
}

/// A broker that delivers at most once is no place for a consumer that was promised more.
#[tokio::test]
async fn a_subscription_that_is_granted_less_than_was_asked_for_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let settings = Settings::from_url(&format!("mqtt://{}", listener.local_addr().expect("an address")));
    let settings = settings.expect("a URL").with("keep_alive", "600s").with("operation_timeout", "60s");
    let (connected, _main) = tokio::join!(MqttBackend.connect(&settings), Peer::greet(&listener));
    let bus = connected.expect("connected");
    let session = async {
        let mut peer = Peer::greet(&listener).await;
        let subscribe = peer.expect(SUBSCRIBE).await;
        // QoS 0, where 1 was asked for.
        peer.write(&[0x90, 4, subscribe[0], subscribe[1], 0, 0]).await;
        peer.expect(DISCONNECT).await;
    };
    let (topic, options) = (Address::topic("news"), ConsumeOptions::default());
    let (consumer, ()) = tokio::join!(timeout(PATIENCE, bus.consumer(&topic, &options)), session);
    let error = consumer.expect("it is told").map(drop).expect_err("not what was asked for");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.message().contains("quality of service 0"), "{error}");
}

/// Whoever could not listen to others that leave listens later: else what they leave behind is found a minute later.
#[tokio::test]
async fn those_who_leave_are_watched_when_it_could_not_be_done_at_first() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let settings = Settings::from_url(&format!("mqtt://{}", listener.local_addr().expect("an address")));
    let settings = settings.expect("a URL").with("keep_alive", "600s").with("operation_timeout", "60s");
    let settings = settings.with("connect_timeout", "60s").with("reconnect_max", "200ms");
    let (connected, peer) = tokio::join!(MqttBackend.connect(&settings), Peer::greet(&listener));
    let bus = connected.expect("connected");
    let mut health = bus.health();
    drop(peer);
    while health.now().state != HealthState::Down {
        timeout(PATIENCE, health.changed()).await.expect("the loss is seen").expect("not closed");
    }
    let (queue, options) = (Address::queue("orders"), ConsumeOptions::default());
    // There is no connection, and the one who asks does not wait for it.
    let _ = timeout(Duration::ZERO, bus.consumer(&queue, &options)).await;
    let mut peer = timeout(PATIENCE, Peer::greet(&listener)).await.expect("it connects again");
    let asks = async {
        while health.now().state == HealthState::Down {
            health.changed().await.expect("not closed");
        }
        drop(bus.consumer(&queue, &options).await);
    };
    let told = async {
        let subscribe = peer.expect(SUBSCRIBE).await;
        assert!(String::from_utf8_lossy(&subscribe).contains("$polymq/gone"), "{subscribe:?}");
    };
    tokio::select! {
        () = asks => panic!("nobody has answered"),
        () = told => {}
    }
}

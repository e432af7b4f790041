//! Mission rows E1 to E9 and E17, on the wire and through handlers; the serializers' own tests have the rules in detail.

use std::{collections::BTreeMap, sync::Arc};

use polymq_core::{
    Body, ConsumeOptions, ConsumerFactory, Kinds, Message, RouteStats, State, dead_letter,
    serializers::{Accept, BoxError, Limits, Serializer, Serializers},
};
use polymq_testkit::{TestBus, TestService};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    note: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Bill {
    total: f64,
}

fn order() -> Order {
    Order { id: 7, note: "é \"quoted\"".into() }
}

/// Sends raw messages to a handler of orders; what it got, its counters and the dead letters.
async fn handled(
    bus: &TestBus,
    accept: Option<Accept>,
    messages: Vec<Message>,
) -> (Vec<Order>, RouteStats, Vec<Message>) {
    async fn take(order: Order, seen: State<mpsc::UnboundedSender<Order>>) {
        seen.send(order).expect("the test listens");
    }
    let (sender, mut seen) = mpsc::unbounded_channel();
    let mut consumers = ConsumerFactory::new(bus);
    let route = consumers.state(sender).route("orders", take);
    if let Some(accept) = accept {
        route.accept(accept);
    }
    let service = TestService::start(consumers).await.expect("start");
    for message in messages {
        service.send_message_and_settle("orders", message).await.expect("sent");
    }
    service.settled().await;
    let stats = service.stats("orders");
    service.stop().await.expect("stop");
    let mut orders = Vec::new();
    while let Ok(order) = seen.try_recv() {
        orders.push(order);
    }
    (orders, stats, bus.take_dead_letters("orders").await)
}

#[tokio::test]
async fn e1_e5_types_travel_in_the_format_they_are_bound_to_and_all_decode() {
    let mut serializers = Serializers::builtin();
    serializers.bind::<Order>("msgpack").expect("known");
    let ids: BTreeMap<u16, String> = serializers.iter().map(|format| (format.id(), format.name().to_owned())).collect();
    assert_eq!(ids.len(), serializers.iter().count(), "ids are unique: {ids:?}");
    for format in serializers.iter() {
        assert_eq!(serializers.by_id(format.id()).expect("by id").name(), format.name());
        assert_eq!(serializers.by_content_type(format.content_type()).expect("by content type").name(), format.name());
    }
    let bus = TestBus::with(|builder| builder.serializers(serializers)).await.expect("connect");
    bus.queue("orders").send(&order()).await.expect("sent");
    bus.queue("bills").send(&Bill { total: 9.5 }).await.expect("sent");
    let sent = bus.recorder().sent();
    assert_eq!(sent[0].message.content_type(), Some("application/vnd.msgpack"));
    assert_eq!(sent[1].message.content_type(), Some("application/json"));
    let json = Message::new(serde_json::to_vec(&order()).expect("json")).with_content_type("application/json");
    let (orders, ..) = handled(&bus, None, vec![json]).await;
    assert_eq!(orders, [order(), order()], "either format reaches the same handler");
}

#[tokio::test]
async fn e4_kind_and_content_type_travel_to_queues_and_topics_alike() {
    let mut kinds = Kinds::new();
    kinds.bind::<Order>("order.created", 3).expect("no conflict");
    let bus = TestBus::with(|builder| builder.kinds(kinds)).await.expect("connect");
    let mut from_topic = bus.topic("news").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let mut from_queue = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    bus.topic("news").send(&order()).await.expect("sent");
    bus.queue("orders")
        .enqueue(bus.queue("orders").message(&order()).expect("encode"))
        .await
        .expect("sent")
        .await
        .expect("sent");
    for subscription in [&mut from_topic, &mut from_queue] {
        let delivery = subscription.next().await.expect("a message");
        let message = delivery.message();
        let labels = (message.kind(), message.version(), message.content_type());
        assert_eq!(labels, (Some("order.created"), Some(3), Some("application/json")));
        delivery.ack().await.expect("ack");
    }
}

#[tokio::test]
async fn e6_an_unlabelled_body_is_a_dead_letter_unless_somebody_asked_for_it_raw() {
    let bus = TestBus::new().await;
    let bare = Message::new(serde_json::to_vec(&order()).expect("json"));
    let (orders, stats, letters) = handled(&bus, None, vec![bare.clone()]).await;
    assert_eq!((orders.len(), stats.undecodable, letters.len()), (0, 1, 1));
    let reason = letters[0].system_headers().get(dead_letter::REASON).expect("a reason");
    assert!(reason.contains("content type"), "{reason}");

    let accept = Accept::any().unlabelled_as("json");
    let (orders, ..) = handled(&bus, Some(accept), vec![bare.clone()]).await;
    assert_eq!(orders, [order()], "the channel says what they are");

    async fn raw(body: Body, seen: State<mpsc::UnboundedSender<Body>>) {
        seen.send(body).expect("the test listens");
    }
    let (sender, mut seen) = mpsc::unbounded_channel::<Body>();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender).route("raw", raw);
    let service = TestService::start(consumers).await.expect("start");
    service.send_message_and_settle("raw", bare.clone()).await.expect("sent");
    assert_eq!(seen.recv().await.expect("the body").0, *bare.payload());
    service.stop().await.expect("stop");
}

#[tokio::test]
async fn e7_only_the_formats_that_a_channel_accepts_decode() {
    let bus = TestBus::new().await;
    let mut packed = Serializers::builtin();
    packed.bind_default("msgpack").expect("known");
    let format = packed.by_name("msgpack").expect("known").clone();
    let body = format.encode(&order(), &Limits::default()).expect("encode");
    let message = Message::new(body).with_content_type("application/vnd.msgpack");
    let (orders, stats, letters) = handled(&bus, Some(Accept::only(["json"])), vec![message]).await;
    assert_eq!((orders.len(), stats.undecodable, letters.len()), (0, 1, 1));
}

#[tokio::test]
async fn e8_a_corrupt_body_of_any_format_is_undecodable_and_the_next_one_is_handled() {
    let bus = TestBus::new().await;
    let good = || Message::new(serde_json::to_vec(&order()).expect("json")).with_content_type("application/json");
    let corrupt = [
        ("application/json", &b"{\"id\": 7, "[..]),
        ("application/json", b"{\"id\": \"seven\", \"note\": \"\"}"),
        ("application/vnd.msgpack", b"\x82\xa2id"),
        ("application/vnd.msgpack", b"\xc1"),
        ("text/plain; charset=utf-8", b"\xff\xfe"),
        ("application/octet-stream", b"bytes"),
        ("application/x-nobody-knows", b"?"),
    ];
    let count = corrupt.len();
    let mut messages = vec![good()];
    messages.extend(corrupt.map(|(label, body)| Message::new(body).with_content_type(label)));
    messages.push(good());
    let (orders, stats, letters) = handled(&bus, None, messages).await;
    assert_eq!(orders, [order(), order()]);
    assert_eq!((stats.undecodable, stats.failed, letters.len()), (count as u64, 0, count), "{stats:?}");
    for letter in letters {
        let reason = letter.system_headers().get(dead_letter::REASON).expect("a reason");
        assert!(reason.starts_with("undecodable"), "{reason}");
        assert_eq!(letter.system_headers().get(dead_letter::ATTEMPTS), Some("1"), "it is not retried");
    }
}

/// JSON written backwards: what a user's crate might bring.
#[derive(Debug)]
struct Backwards;

impl Serializer for Backwards {
    fn name(&self) -> &str {
        "backwards"
    }

    fn content_type(&self) -> &str {
        "application/x-backwards"
    }

    fn id(&self) -> u16 {
        4711
    }

    fn encode(&self, value: &dyn erased_serde::Serialize) -> Result<Vec<u8>, BoxError> {
        let mut body = serde_json::to_vec(value)?;
        body.reverse();
        Ok(body)
    }

    fn decode(
        &self,
        body: &[u8],
        visit: &mut dyn FnMut(&mut dyn erased_serde::Deserializer<'_>) -> Result<(), erased_serde::Error>,
    ) -> Result<(), BoxError> {
        let forwards: Vec<u8> = body.iter().rev().copied().collect();
        let mut deserializer = serde_json::Deserializer::from_slice(&forwards);
        visit(&mut <dyn erased_serde::Deserializer<'_>>::erase(&mut deserializer))?;
        Ok(deserializer.end()?)
    }
}

#[tokio::test]
async fn e2_e3_e9_a_users_own_format_is_bound_like_any_other_and_its_id_cannot_be_taken() {
    let mut serializers = Serializers::builtin();
    serializers.add(Arc::new(Backwards)).expect("free");
    assert!(serializers.add(Arc::new(Backwards)).is_err(), "name, id and content type are taken");
    serializers.bind::<Order>("backwards").expect("known");
    let bus = TestBus::with(|builder| builder.serializers(serializers)).await.expect("connect");
    bus.queue("orders").send(&order()).await.expect("sent");
    assert_eq!(bus.recorder().to("orders")[0].content_type(), Some("application/x-backwards"));
    assert!(bus.recorder().to("orders")[0].payload().starts_with(b"}"));
    let (orders, ..) = handled(&bus, None, Vec::new()).await;
    assert_eq!(orders, [order()]);
}

#[tokio::test]
async fn e17_huge_and_deeply_nested_bodies_are_refused() {
    let limits = Limits { max_bytes: 1000, max_depth: 10 };
    let bus = TestBus::with(|builder| builder.limits(limits)).await.expect("connect");
    let deep = format!("{{\"id\": 1, \"note\": \"\", \"x\": {}{}}}", "[".repeat(50), "]".repeat(50));
    let huge = format!("{{\"id\": 1, \"note\": \"{}\"}}", "x".repeat(2000));
    let messages = [deep, huge].map(|body| Message::new(body).with_content_type("application/json")).into();
    let (orders, stats, letters) = handled(&bus, None, messages).await;
    assert_eq!((orders.len(), stats.undecodable, letters.len()), (0, 2, 2));
}

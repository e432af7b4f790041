//! B5 to B9: connecting, what does not exist or is not allowed, what "sent" means, and other people's clients.

use std::net::{Ipv4Addr, SocketAddr};

use polymq_core::{Bus, ConsumeOptions, ErrorKind, HealthState, Message};
use tokio::net::{TcpListener, TcpSocket};

use crate::{
    BareMessage, Case, Cx, PATIENCE,
    case::run,
    drive::{
        closes, in_order, is_written_down, next, publish, quiet, refused, subscribe, subscribe_with, take_acked, text,
    },
    eventually, golden_message,
};

pub(super) const CASES: &[Case] = &[
    Case::new("B5_missing_queue_consume", run!(missing_queue_consume)),
    Case::new("B5_missing_queue_send", run!(missing_queue_send)),
    Case::new("B5_created_by_policy", run!(created_by_policy)),
    Case::new("B5_wrong_password", run!(wrong_password)).broker(),
    Case::new("B5_permission_denied", run!(permission_denied)).broker(),
    Case::new("B6_constructors_do_no_io", run!(constructors_do_no_io)),
    Case::new("B6_connect_is_bounded", run!(connect_is_bounded)).broker(),
    Case::new("B6_handles_outlive_their_task", run!(handles_outlive_their_task)),
    Case::new("B7_confirmed_survives_kill", run!(confirmed_survives_kill))
        .when("persistent", |c| c.persistent, run!(not_persistent))
        .own_broker(),
    Case::new("B8_unroutable_is_an_error", run!(unroutable)).when(
        "detects_unroutable",
        |c| c.detects_unroutable,
        run!(declared_queues_hold),
    ),
    Case::new("B9_foreign_message_is_handled", run!(foreign_message)).broker(),
    Case::new("B9_bare_client_reads_ours", run!(bare_client_reads)).broker(),
    Case::new("B9_golden", run!(golden)).broker(),
];

fn not_declared() -> ConsumeOptions {
    ConsumeOptions { declare: false, ..ConsumeOptions::default() }
}

/// The answer of something that may not take longer than the [harness](crate::Harness::soon) says.
async fn soon<T>(cx: &Cx, what: &str, future: impl Future<Output = T>) -> T {
    let soon = cx.harness().soon();
    tokio::time::timeout(soon, future).await.unwrap_or_else(|_| panic!("{what}: no answer within {soon:?}"))
}

/// Consuming a queue that does not exist, and must not be created, is `NotFound` soon.
pub async fn missing_queue_consume(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    refused(soon(&cx, "consume", queue.subscribe(not_declared())).await, &[ErrorKind::NotFound]);
    // The refusal has created nothing, and the connection goes on.
    refused(soon(&cx, "consume again", queue.subscribe(not_declared())).await, &[ErrorKind::NotFound]);
    publish(&queue, ["now it exists".to_owned()]).await;
    assert_eq!(take_acked(&mut subscribe_with(&queue, not_declared()).await, 1).await, ["now it exists"]);
}

/// Sending to a queue that does not exist, and must not be created, is `NotFound` or `Unroutable` soon.
pub async fn missing_queue_send(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let kinds = [ErrorKind::NotFound, ErrorKind::Unroutable];
    for _ in 0..2 {
        refused(soon(&cx, "send", queue.existing().send_message(Message::new("lost"))).await, &kinds);
    }
    let mut subscription = subscribe(&queue).await;
    quiet(&mut subscription).await;
}

/// Where it may be created, consuming creates the queue and its dead-letter queue, and sending creates the queue.
pub async fn created_by_policy(cx: Cx) {
    let bus = cx.bus().await;
    let (consumed, sent) = (cx.queue(&bus), cx.queue(&bus));
    let mut subscription = subscribe(&consumed).await;
    consumed.existing().send_message(Message::new("to what consuming made")).await.expect("it exists");
    assert_eq!(take_acked(&mut subscription, 1).await, ["to what consuming made"]);
    let letters = bus.channel(consumed.address().dead_letters(None));
    letters.existing().send_message(Message::new("letter")).await.expect("the dead-letter queue exists");
    publish(&sent, ["to what sending made".to_owned()]).await;
    assert_eq!(take_acked(&mut subscribe_with(&sent, not_declared()).await, 1).await, ["to what sending made"]);
}

/// A wrong password is `Unauthenticated`, soon, and is not tried for ever.
pub async fn wrong_password(cx: Cx) {
    let url = cx.harness().wrong_password().expect("a backend with a broker must bring a URL with a wrong password");
    let error = refused(
        soon(&cx, "the attempt to connect", cx.builder_to(url.clone()).with("connect_timeout", "50s").connect()).await,
        &[ErrorKind::Unauthenticated],
    );
    let secret = url.split('@').next().and_then(|login| login.rsplit(':').next()).unwrap_or_default();
    let shown = format!("{error} {error:?}");
    assert!(!secret.is_empty() && !shown.contains(secret), "the error shows the password: {shown}");
}

/// A user without the permission gets `PermissionDenied`, from sending or from consuming, and stays connected.
pub async fn permission_denied(cx: Cx) {
    let denied = cx.harness().denied().expect("a backend with a broker must bring a user without permission");
    let bus = cx.builder_to(denied.url).with("connect_timeout", "50s").connect().await.expect("this user may connect");
    let queue = bus.channel(denied.address);
    refused(soon(&cx, "send", queue.send_message(Message::new("x"))).await, &[ErrorKind::PermissionDenied]);
    if denied.consumers_are_told {
        refused(soon(&cx, "consume", queue.subscribe(ConsumeOptions::default())).await, &[ErrorKind::PermissionDenied]);
    }
    eventually(PATIENCE, || async { bus.ping().await.map_err(|error| error.to_string()) }).await;
}

/// Nothing but `connect` reaches the network: builders and checks work without a runtime, and handles of channels
/// make nothing.
pub async fn constructors_do_no_io(cx: Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let url = cx.harness().url(Some(address));
    let started = std::time::Instant::now();
    let without_runtime = cx.clone();
    let check = move || std::thread::spawn(move || without_runtime.builder_to(url).check()).join();
    let checked = tokio::task::spawn_blocking(check).await.expect("joined").expect("no panic without a runtime");
    checked.expect("the settings are good");
    assert!(started.elapsed() < PATIENCE, "checking took {:?}", started.elapsed());
    // Polled once: a connection that was made is in the backlog of the listener already.
    let connected = tokio::select! { biased; _ = listener.accept() => true, () = std::future::ready(()) => false };
    assert!(!connected, "checking has connected");

    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let _handles = (queue.with_timeout(PATIENCE), queue.existing(), bus.topic(queue.address().name()));
    refused(queue.subscribe(not_declared()).await, &[ErrorKind::NotFound]);
}

/// Connecting to nobody, and to somebody who never answers, ends with a typed error within the set time.
pub async fn connect_is_bounded(cx: Cx) {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    // Bound, so that nobody else gets it, and not listening.
    let closed = TcpSocket::new_v4().expect("a socket");
    closed.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port");
    for address in [silent.local_addr().expect("an address"), closed.local_addr().expect("an address")] {
        let builder = cx.builder_to(cx.harness().url(Some(address))).with("connect_timeout", "1s");
        let error = soon(&cx, "the attempt to connect", builder.connect()).await.expect_err("nobody answers");
        let kinds = [ErrorKind::Disconnected, ErrorKind::Timeout];
        assert!(kinds.contains(&error.kind()), "{error:?}");
        assert_ne!(error.retry(), polymq_core::Retry::Never, "it may help to try again: {error:?}");
    }
}

/// A connection, a channel and a subscription work on after the task that made them has ended.
pub async fn handles_outlive_their_task(cx: Cx) {
    let made = cx.clone();
    let (bus, queue, mut subscription) = tokio::spawn(async move {
        let bus = made.bus().await;
        let queue = made.queue(&bus);
        // Its producer is opened later, by another task.
        let subscription = subscribe(&queue).await;
        (bus, queue, subscription)
    })
    .await
    .expect("the making task");
    let other = queue.clone();
    tokio::spawn(async move { publish(&other, ["first".to_owned()]).await }).await.expect("the sending task");
    publish(&queue, ["second".to_owned()]).await;
    let delivery = next(&mut subscription).await;
    tokio::spawn(async move { delivery.ack().await.expect("ack") }).await.expect("the settling task");
    assert_eq!(take_acked(&mut subscription, 1).await, ["second"]);
    assert_eq!(bus.health().state, HealthState::Up);
}

/// What was confirmed is there after the broker was killed right afterwards.
pub async fn confirmed_survives_kill(cx: Cx) {
    for round in 0..2 {
        let bus = cx.bus().await;
        let queue = cx.queue(&bus);
        // The producer is open, so that the one send is all that the broker has time for.
        publish(&queue, ["before".to_owned()]).await;
        is_written_down(&cx, &bus).await;
        queue.send_message(Message::new("confirmed")).await.expect("confirmed");
        // A broker that writes a moment after it has answered has written it when it answers the next one.
        if !cx.harness().write_lag().is_zero() {
            is_written_down(&cx, &bus).await;
        }
        cx.broker().kill().await;
        // Whatever the client still holds back is lost with it.
        let closing = tokio::time::timeout(PATIENCE, bus.close()).await;
        drop(closing.expect("closing is bounded while the broker is down"));
        cx.broker().start().await;
        let bus = cx.bus().await;
        let again = bus.channel(queue.address().clone());
        let mut seen = take_acked(&mut subscribe(&again).await, 2).await;
        seen.sort();
        assert_eq!(seen, ["before", "confirmed"], "round {round}");
        let _ = bus.close().await;
    }
}

/// A backend that keeps nothing over a restart says so in both places.
pub async fn not_persistent(cx: Cx) {
    assert!(!cx.bus().await.capabilities().persistent, "backend and connection declare the same");
}

/// A message for a queue that is no more is an error of the sender, not silence, and the sender goes on.
pub async fn unroutable(cx: Cx) {
    let bus = cx.bus().await;
    let (gone, stays) = (cx.queue(&bus), cx.queue(&bus));
    publish(&stays, ["one".to_owned()]).await;
    let mut subscription = subscribe(&gone).await;
    publish(&gone, ["taken".to_owned()]).await;
    assert_eq!(take_acked(&mut subscription, 1).await, ["taken"]);
    subscription.close().await.expect("close");
    let existing = gone.existing();
    existing.send_message(Message::new("still there")).await.expect("it exists");
    gone.delete(None).await.expect("delete");
    let kinds = [ErrorKind::Unroutable, ErrorKind::NotFound];
    for _ in 0..3 {
        refused(soon(&cx, "send", existing.send_message(Message::new("lost"))).await, &kinds);
    }
    let results = existing.send_all((0..5).map(|n| Message::new(format!("lost {n}")))).await;
    assert_eq!(results.len(), 5);
    results.into_iter().for_each(|result| drop(refused(result, &kinds)));
    publish(&stays, ["two".to_owned()]).await;
    assert_eq!(in_order(&cx, take_acked(&mut subscribe(&stays).await, 2).await), ["one", "two"]);
}

/// Where a lost message cannot be noticed, a declared queue holds it all the same, without any consumer.
pub async fn declared_queues_hold(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["held".to_owned()]).await;
    closes(&bus).await;
    let bus: Bus = cx.bus().await;
    let queue = bus.channel(queue.address().clone());
    assert_eq!(take_acked(&mut subscribe(&queue).await, 1).await, ["held"]);
}

/// A message of a client that knows nothing of polymq is a message: its body, content type and header are there.
pub async fn foreign_message(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    cx.bare()
        .send(queue.address().name(), BareMessage { body: b"\xff\x00 bare".to_vec(), ..BareMessage::default() })
        .await;
    let delivery = next(&mut subscription).await;
    assert_eq!(&delivery.message().payload()[..], b"\xff\x00 bare");
    assert_eq!((delivery.message().content_type(), delivery.attempt()), (None, 1));
    assert!(delivery.message().headers().is_empty());
    delivery.ack().await.expect("ack");

    cx.bare().send(queue.address().name(), cx.bare().foreign()).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(text(&delivery).into_bytes(), cx.bare().foreign().body);
    assert_eq!(delivery.message().content_type(), Some("application/json"));
    assert_eq!(delivery.message().headers().get("tenant"), Some("acme"));
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// A bare client finds our body on the queue, untouched.
pub async fn bare_client_reads(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let body = b"{\"id\": 1}\n\xff";
    queue.declare(ConsumeOptions::default()).await.expect("declare");
    let mut bare = cx.bare().listen(queue.address().name()).await;
    queue.send_message(Message::new(&body[..]).with_content_type("application/json")).await.expect("send");
    let got = bare.next(PATIENCE).await.expect("a message on the queue");
    assert_eq!(got.body, body, "the body on the wire is the user's");
}

/// The golden message is on the wire exactly as the backend's own list of properties says.
pub async fn golden(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    queue.declare(ConsumeOptions::default()).await.expect("declare");
    let mut bare = cx.bare().listen(queue.address().name()).await;
    queue.send_message(golden_message()).await.expect("send");
    let got = bare.next(PATIENCE).await.expect("a message on the queue");
    assert_eq!(got, cx.bare().golden());

    // The other way: what a bare client writes like this is the same message.
    queue.delete(None).await.expect("delete");
    let mut subscription = subscribe(&queue).await;
    cx.bare().send(queue.address().name(), cx.bare().golden()).await;
    let delivery = next(&mut subscription).await;
    let (message, golden) = (delivery.message(), golden_message());
    assert_eq!(message.payload(), golden.payload());
    assert_eq!((message.id(), message.time(), message.key()), (golden.id(), golden.time(), golden.key()));
    assert_eq!((message.kind(), message.version()), (golden.kind(), golden.version()));
    assert_eq!((message.content_type(), message.headers()), (golden.content_type(), golden.headers()));
    assert_eq!((message.correlation_id(), message.reply_to()), (golden.correlation_id(), golden.reply_to()));
    delivery.ack().await.expect("ack");
}

use futures_util::{FutureExt, future::join_all};
use polymq_amqp::AmqpConnection;
use polymq_core::{Address, Connection, Error, ErrorKind, Message, ProduceOptions, Retry};

use super::harness::*;

/// A connection with a single channel for all messages, and without the right to send to topics.
async fn limited() -> AmqpConnection {
    let (broker, user) = (shared(), unique("limited"));
    broker.management("PUT", &format!("users/{user}"), r#"{"password":"pw","tags":""}"#).await;
    let rights = r#"{"configure":".*","write":"^(mine-|amq.default)","read":".*"}"#;
    broker.management("PUT", &format!("permissions/%2F/{user}"), rights).await;
    connect(&format!("amqp://{user}:pw@127.0.0.1:{}?channels=1", broker.port)).await
}

fn of_size(size: usize) -> Message {
    message(&"x".repeat(size))
}

/// `None` for what was confirmed.
fn answer_of(error: Option<Error>) -> Option<(ErrorKind, Retry)> {
    error.map(|error| (error.kind(), error.retry()))
}

/// The broker ends the channel of all over a message that is too large, and says no more than its size. What was written
/// behind it is sent all the same.
pub async fn a_message_that_is_too_large_is_refused_for_good_and_no_other() {
    let connection = connect(&format!("{}?channels=1", shared().url())).await;
    let queue = Address::queue(unique("too-large"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("first")).await.expect("sent");
    let sizes = [LARGEST + 1, LARGEST + 2, LARGEST + 1, 1, 2];
    let answers = within(60, join_all(sizes.map(|size| producer.send(of_size(size))))).await;
    for (size, answer) in sizes.into_iter().zip(answers) {
        let expected = (size > LARGEST).then_some((ErrorKind::TooLarge, Retry::Never));
        assert_eq!(answer_of(answer.err()), expected, "{size}");
    }
    // What came after it is in its place, once.
    let mut consumer = consumer(&connection, &queue).await;
    let seen: Vec<_> = receive(&mut *consumer, 3).await.iter().map(|incoming| text(incoming).len()).collect();
    assert_eq!(seen, [5, 1, 2]);
    silence(&mut *consumer, 300).await;
}

/// The broker names the place that is not allowed: of several messages to it each is told for certain in the end, and what
/// came after them is sent.
pub async fn several_messages_that_are_not_allowed_are_told_one_by_one() {
    let connection = limited().await;
    let queue = Address::queue(unique("bystander"));
    let good = producer(&connection, &queue).await;
    let bad = connection.producer(&Address::topic("t"), &ProduceOptions::default()).await.expect("a producer");
    send(&*good, message("before")).await.expect("sent");
    let mut left = 3;
    while left > 0 {
        let refused: Vec<_> = (0..left).map(|_| bad.send(message("x"))).collect();
        let behind = good.send(message("behind"));
        let mut unknown = 0;
        for refused in within(60, join_all(refused)).await {
            match answer_of(refused.err()) {
                Some((ErrorKind::PermissionDenied, Retry::Never)) => {}
                Some((ErrorKind::PermissionDenied, Retry::UnknownOutcome)) => unknown += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(unknown < left, "none of {left} was told for certain");
        left = unknown;
        within(60, behind).await.expect("it was not looked at, and sent again");
    }
}

/// Who waits for all that was sent waits for what is sent again, too.
pub async fn a_flush_waits_for_what_is_written_again() {
    let connection = connect(&format!("{}?channels=1", shared().url())).await;
    let producer = producer(&connection, &Address::queue(unique("flushed"))).await;
    for _ in 0..5 {
        let refused = producer.send(of_size(LARGEST + 1));
        let behind: Vec<_> = (0..20).map(|n| producer.send(message(&n.to_string()))).collect();
        within(60, producer.flush()).await.expect("flushed");
        for answer in behind {
            answer.now_or_never().expect("answered").expect("sent");
        }
        assert_eq!(within(60, refused).await.expect_err("too large").kind(), ErrorKind::TooLarge);
    }
}

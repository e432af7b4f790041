//! The best loops that can be written on lapin by hand, and what prepares and checks a run of the others.

use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, all_handled, handled, payload, spread, workers},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
    },
    types::FieldTable,
};

use crate::QUEUE;

pub async fn connect(options: &Options) -> Connection {
    Connection::connect(options.need("url"), ConnectionProperties::default()).await.expect("a broker")
}

/// A durable queue with nothing in it.
pub async fn empty_queue(connection: &Connection) {
    let channel = connection.create_channel().await.expect("a channel");
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.expect("declared");
    channel.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.expect("purged");
}

/// Checks that so many messages are in a queue. Those that were delivered and not acknowledged come back when their
/// channel is closed, so after a run they are among these.
pub async fn expect_left(options: &Options, queue: &str, messages: u64) {
    let connection = connect(options).await;
    let channel = connection.create_channel().await.expect("a channel");
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let mut found = 0;
    // What was closed just now may take a moment to be given back, and what was acknowledged to be forgotten.
    for _ in 0..50 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let queue = channel.queue_declare(queue.into(), passive, FieldTable::default()).await.expect("there");
        found = u64::from(queue.message_count());
        if found == messages {
            return;
        }
    }
    panic!("the queue {queue} holds {found} messages, not {messages}");
}

pub async fn delete(options: &Options, queue: &str) {
    let connection = connect(options).await;
    let channel = connection.create_channel().await.expect("a channel");
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.expect("deleted");
}

/// Publishes with a sliding window of unconfirmed messages, until the last confirm. Waiting for all of the window at
/// once beats a queue of confirms whose first one is waited for: a confirm often covers many messages, and then many
/// are published before the next wait.
async fn publish_window(
    channel: &Channel,
    queue: &str,
    body: &[u8],
    properties: &BasicProperties,
    messages: u64,
    window: usize,
) {
    // What no queue takes comes back, instead of being confirmed and gone: polymq asks for that too.
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let publishes = stream::iter(0..messages).map(|_| async {
        let sent =
            channel.basic_publish("".into(), queue.into(), mandatory, body, properties.clone()).await.expect("sent");
        assert!(matches!(sent.await.expect("answered"), Confirmation::Ack(None)), "taken by the queue");
    });
    publishes.buffer_unordered(window).for_each(|()| std::future::ready(())).await;
}

fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

async fn confirm_channel(connection: &Connection) -> Channel {
    let channel = connection.create_channel().await.expect("a channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    channel
}

/// Puts messages into a queue for a run of a consumer.
pub async fn fill(options: &Options, queue: &str) {
    let connection = connect(options).await;
    let channel = confirm_channel(&connection).await;
    publish_window(&channel, queue, &payload(options), &persistent(), options.messages(), 1024).await;
    let _ = connection.close(200, "done".into()).await;
}

pub async fn publish(options: Options) -> Numbers {
    publish_with(options, persistent()).await
}

/// Messages that can be told apart, as polymq's can: what the broker and the wire pay for that.
pub async fn publish_with_ids(options: Options) -> Numbers {
    let id = "0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c";
    publish_with(options, persistent().with_message_id(id.into()).with_timestamp(1_700_000_000)).await
}

async fn publish_with(options: Options, properties: BasicProperties) -> Numbers {
    let connection = connect(&options).await;
    empty_queue(&connection).await;
    let mut channels = Vec::new();
    for _ in 0..workers(&options) {
        channels.push(confirm_channel(&connection).await);
    }
    let channels = std::sync::Mutex::new(channels);
    let body = payload(&options);
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let channel = channels.lock().expect("no panic").pop().expect("one a worker");
        let (body, properties) = (body.clone(), properties.clone());
        async move { publish_window(&channel, QUEUE, &body, &properties, share, WINDOW).await }
    })
    .await;
    let numbers = meter.stop(options.messages());
    expect_left(&options, QUEUE, options.messages()).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    consume_acknowledging(options, Some(1)).await
}

pub async fn consume_cumulative(options: Options) -> Numbers {
    consume_acknowledging(options, Some(64)).await
}

/// What the broker can deliver at most: it forgets a message when it sends it.
pub async fn consume_unacknowledged(options: Options) -> Numbers {
    consume_acknowledging(options, None).await
}

/// One consumer a worker, each on a channel of its own; `every` messages are acknowledged together.
async fn consume_acknowledging(options: Options, every: Option<u64>) -> Numbers {
    let connection = connect(&options).await;
    empty_queue(&connection).await;
    fill(&options, QUEUE).await;
    let mut channels = Vec::new();
    for _ in 0..workers(&options) {
        let channel = connection.create_channel().await.expect("a channel");
        channel.basic_qos(WINDOW as u16, BasicQosOptions::default()).await.expect("qos");
        let settings = BasicConsumeOptions { no_ack: every.is_none(), ..BasicConsumeOptions::default() };
        let consume = channel.basic_consume(QUEUE.into(), "".into(), settings, FieldTable::default());
        let mut consumer = consume.await.expect("a consumer");
        channels.push(channel);
        tokio::spawn(async move {
            let mut waiting = 0;
            while let Some(Ok(delivery)) = consumer.next().await {
                handled(&delivery.data);
                let Some(every) = every else { continue };
                waiting += 1;
                // The rest of what was handled must not wait for more to come.
                if waiting >= every || LATCH.remaining() < WINDOW * 8 {
                    delivery.acker.ack(BasicAckOptions { multiple: every > 1 }).await.expect("acknowledged");
                    waiting = 0;
                }
            }
        });
    }
    let numbers = all_handled(options.messages()).await;
    finish(connection, channels).await;
    expect_left(&options, QUEUE, 0).await;
    numbers
}

async fn finish(connection: Connection, channels: Vec<Channel>) {
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    for channel in channels {
        let _ = channel.close(200, "done".into()).await;
    }
    let _ = connection.close(200, "done".into()).await;
}

//! RabbitMQ by lapin: a durable queue of `kind=`, classic or quorum, persistent messages, publisher confirms.

use bytes::Bytes;
use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, all_handled, handled, payload, spread, workers},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};

use crate::{latency as beat, queue};

async fn connect(url: &str) -> Result<Connection, lapin::Error> {
    Connection::connect(url, ConnectionProperties::default()).await
}

/// A channel on a connection of its own.
async fn channel(url: &str) -> (Connection, Channel) {
    let connection = connect(url).await.expect("a broker");
    let channel = connection.create_channel().await.expect("a channel");
    (connection, channel)
}

async fn confirm_channel(url: &str) -> (Connection, Channel) {
    let (connection, channel) = channel(url).await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    (connection, channel)
}

async fn declare(url: &str, name: &str, kind: &str) {
    let (_connection, channel) = channel(url).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), durable, arguments).await.expect("declared");
}

async fn send(channel: &Channel, name: &str, body: &[u8]) {
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let persistent = BasicProperties::default().with_delivery_mode(2);
    let sent = channel.basic_publish("".into(), name.into(), mandatory, body, persistent).await.expect("sent");
    assert!(matches!(sent.await.expect("answered"), Confirmation::Ack(None)), "taken by the queue");
}

/// Waiting for all of the window at once beats a queue of confirms whose first one is waited for.
async fn send_window(channel: &Channel, name: &str, body: &[u8], messages: u64) {
    let sends = stream::iter(0..messages).map(|_| send(channel, name, body));
    sends.buffer_unordered(WINDOW).for_each(|()| std::future::ready(())).await;
}

/// Fails unless the queue comes to hold so many messages; then it is removed.
async fn expect_left(url: &str, name: &str, messages: u64) {
    let (_connection, channel) = channel(url).await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let mut found = 0;
    for _ in 0..100 {
        let queue = channel.queue_declare(name.into(), passive, FieldTable::default()).await.expect("there");
        found = u64::from(queue.message_count());
        if found == messages {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(found, messages, "messages in {name}");
    channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.expect("deleted");
}

pub async fn fill(options: &Options, url: &str, name: &str, body: &Bytes, messages: u64) {
    declare(url, name, options.need("kind")).await;
    let (_connection, channel) = confirm_channel(url).await;
    send_window(&channel, name, body, messages).await;
}

pub async fn publish(options: Options) -> Numbers {
    let url = options.need("url");
    declare(url, &queue(), options.need("kind")).await;
    let mut channels = Vec::new();
    for _ in 0..workers(&options) {
        channels.push(confirm_channel(url).await);
    }
    let pool = std::sync::Mutex::new(channels);
    let body = payload(&options);
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let (connection, channel) = pool.lock().expect("no panic").pop().expect("one a worker");
        let body = body.clone();
        async move {
            send_window(&channel, &queue(), &body, share).await;
            drop(connection);
        }
    })
    .await;
    let numbers = meter.stop(options.messages());
    expect_left(url, &queue(), options.messages()).await;
    numbers
}

async fn consumer(channel: &Channel) -> Consumer {
    channel.basic_qos(WINDOW as u16, BasicQosOptions::default()).await.expect("qos");
    let consume =
        channel.basic_consume(queue().into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
    consume.await.expect("a consumer")
}

/// Acknowledges so many messages at once; none is left waiting for more to come.
async fn receive(mut consumer: Consumer, every: u64, handle: fn(&[u8])) {
    let mut waiting = 0;
    while let Some(Ok(delivery)) = consumer.next().await {
        handle(&delivery.data);
        waiting += 1;
        if waiting >= every || LATCH.remaining() < WINDOW * 32 {
            delivery.acker.ack(BasicAckOptions { multiple: every > 1 }).await.expect("acknowledged");
            waiting = 0;
        }
    }
}

pub async fn consume(options: Options) -> Numbers {
    let url = options.need("url");
    fill(&options, url, &queue(), &payload(&options).into(), options.messages()).await;
    let mut channels = Vec::new();
    for _ in 0..workers(&options) {
        channels.push(channel(url).await);
    }
    for (_, channel) in &channels {
        tokio::spawn(receive(consumer(channel).await, WINDOW as u64 / 2, handled));
    }
    let numbers = all_handled(options.messages()).await;
    finish(channels).await;
    expect_left(url, &queue(), 0).await;
    numbers
}

/// What was written last is on its way before the connections end.
async fn finish(channels: Vec<(Connection, Channel)>) {
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    for (connection, channel) in channels {
        let _ = channel.close(200, "done".into()).await;
        let _ = connection.close(200, "done".into()).await;
    }
}

pub async fn latency(options: Options) -> Numbers {
    let url = options.need("url");
    declare(url, &queue(), options.need("kind")).await;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..workers(&options) {
        senders.push(confirm_channel(url).await);
        receivers.push(channel(url).await);
    }
    for (_, channel) in &receivers {
        tokio::spawn(receive(consumer(channel).await, 1, beat::arrived));
    }
    beat::prepared().await;
    for (sender, (_, channel)) in (0..).zip(&senders) {
        let (options, channel) = (options.clone(), channel.clone());
        tokio::spawn(async move {
            let mut beat = beat::beat(&options, sender);
            for _ in (sender..options.messages()).step_by(workers(&options) as usize) {
                beat.tick().await;
                let (channel, body) = (channel.clone(), beat::stamp(&options));
                tokio::spawn(async move { send(&channel, &queue(), &body).await });
            }
        });
    }
    let numbers = beat::taken().await;
    finish(receivers).await;
    expect_left(url, &queue(), 0).await;
    numbers
}

/// Whether a broker answers.
pub async fn answers(url: &str) -> bool {
    connect(url).await.is_ok()
}

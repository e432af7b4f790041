//! NATS JetStream by async-nats: a stream that is a work queue, in files, and a pull consumer with explicit acknowledgement.

use async_nats::jetstream::{
    self, Context, ContextBuilder,
    consumer::{AckPolicy, PullConsumer, pull},
    stream::{Config, RetentionPolicy, StorageType},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled, handled, payload, spread, workers},
};

use crate::{latency as beat, queue};

async fn connect(url: &str) -> Context {
    ContextBuilder::new().max_ack_inflight(WINDOW).build(async_nats::connect(url).await.expect("a server"))
}

async fn declare(context: &Context, name: &str) -> jetstream::stream::Stream {
    let config = Config {
        name: name.to_owned(),
        subjects: vec![name.to_owned()],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        ..Config::default()
    };
    context.create_stream(config).await.expect("declared")
}

async fn send(context: &Context, name: &str, body: Bytes) {
    context.publish(name.to_owned(), body).await.expect("sent").await.expect("confirmed");
}

async fn send_window(context: &Context, name: &str, body: &Bytes, messages: u64) {
    let sends = stream::iter(0..messages).map(|_| send(context, name, body.clone()));
    sends.buffer_unordered(WINDOW).for_each(|()| std::future::ready(())).await;
}

/// Fails unless the stream comes to hold so many messages; then it is removed.
async fn expect_left(context: &Context, name: &str, messages: u64) {
    let mut found = 0;
    for _ in 0..100 {
        found = context.get_stream(name).await.expect("there").cached_info().state.messages;
        if found == messages {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(found, messages, "messages in {name}");
    context.delete_stream(name).await.expect("deleted");
}

pub async fn fill(url: &str, name: &str, body: &Bytes, messages: u64) {
    let context = connect(url).await;
    declare(&context, name).await;
    send_window(&context, name, body, messages).await;
}

pub async fn publish(options: Options) -> Numbers {
    let mut contexts = Vec::new();
    for _ in 0..workers(&options) {
        contexts.push(connect(options.need("url")).await);
    }
    declare(&contexts[0], &queue()).await;
    let pool = std::sync::Mutex::new(contexts.clone());
    let body: Bytes = payload(&options).into();
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let context = pool.lock().expect("no panic").pop().expect("one a worker");
        let body = body.clone();
        async move { send_window(&context, &queue(), &body, share).await }
    })
    .await;
    let numbers = meter.stop(options.messages());
    expect_left(&contexts[0], &queue(), options.messages()).await;
    numbers
}

/// The consumer that all receivers of a process share.
async fn consumer(context: &Context, receivers: u64) -> PullConsumer {
    let stream = context.get_stream(queue()).await.expect("there");
    let config = pull::Config {
        durable_name: Some("bench".into()),
        ack_policy: AckPolicy::Explicit,
        max_ack_pending: receivers.cast_signed() * WINDOW as i64,
        ..pull::Config::default()
    };
    stream.get_or_create_consumer("bench", config).await.expect("a consumer")
}

async fn receive(consumer: PullConsumer, handle: fn(&[u8])) {
    let stream = consumer.stream().max_messages_per_batch(WINDOW);
    let mut messages = stream.messages().await.expect("messages");
    // Its end is that the stream was removed, after all were handled.
    while let Some(Ok(message)) = messages.next().await {
        handle(&message.payload);
        message.ack().await.expect("acknowledged");
    }
}

pub async fn consume(options: Options) -> Numbers {
    let url = options.need("url");
    fill(url, &queue(), &payload(&options).into(), options.messages()).await;
    let mut contexts = Vec::new();
    for _ in 0..workers(&options) {
        contexts.push(connect(url).await);
    }
    let mut consumers = Vec::new();
    for context in &contexts {
        consumers.push(consumer(context, workers(&options)).await);
    }
    for consumer in consumers {
        tokio::spawn(receive(consumer, handled));
    }
    let numbers = all_handled(options.messages()).await;
    expect_left(&contexts[0], &queue(), 0).await;
    numbers
}

pub async fn latency(options: Options) -> Numbers {
    let url = options.need("url");
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..workers(&options) {
        senders.push(connect(url).await);
        receivers.push(connect(url).await);
    }
    declare(&senders[0], &queue()).await;
    for context in &receivers {
        tokio::spawn(receive(consumer(context, workers(&options)).await, beat::arrived));
    }
    beat::prepared().await;
    for (sender, context) in (0..).zip(&senders) {
        let (options, context) = (options.clone(), context.clone());
        tokio::spawn(async move {
            let mut beat = beat::beat(&options, sender);
            for _ in (sender..options.messages()).step_by(workers(&options) as usize) {
                beat.tick().await;
                let (context, body) = (context.clone(), beat::stamp(&options));
                tokio::spawn(async move { send(&context, &queue(), body).await });
            }
        });
    }
    let numbers = beat::taken().await;
    expect_left(&senders[0], &queue(), 0).await;
    numbers
}

/// Whether a server answers, its JetStream included.
pub async fn answers(url: &str) -> bool {
    // The client logs nothing and gives up at once when nobody listens.
    let Ok(client) = async_nats::connect(url).await else { return false };
    jetstream::new(client).query_account().await.is_ok()
}

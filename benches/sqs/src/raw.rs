//! The best loops that can be written on the AWS SDK by hand.

use std::time::{Duration, Instant};

use aws_sdk_sqs::{
    Client, Config,
    config::{BehaviorVersion, Credentials, Region, retry::RetryConfig},
    types::{
        DeleteMessageBatchRequestEntry, Message, MessageAttributeValue, QueueAttributeName,
        SendMessageBatchRequestEntry,
    },
};
use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled},
};

use crate::{BATCH, REQUESTS, endpoint, queue, text};

pub fn config(options: &Options) -> Config {
    Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("test", "test", None, None, "bench"))
        .retry_config(RetryConfig::disabled())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(endpoint(options))
        .build()
}

pub fn client(options: &Options) -> Client {
    Client::from_conf(config(options))
}

/// Makes a queue of this process's own.
pub async fn create(client: &Client, name: &str) -> String {
    client.create_queue().queue_name(name).send().await.expect("a queue").queue_url.expect("its URL")
}

pub async fn delete(client: &Client, url: &str) {
    client.delete_queue().queue_url(url).send().await.expect("deleted");
}

/// Sends `messages` in batches of ten, so many requests at a time; every entry must be accepted.
async fn send(client: &Client, url: &str, body: &str, messages: u64, with_ids: bool) {
    let requests = stream::iter(0..messages.div_ceil(BATCH as u64)).map(|request| async move {
        let from = request * BATCH as u64;
        let mut batch = client.send_message_batch().queue_url(url);
        for n in from..messages.min(from + BATCH as u64) {
            let mut entry = SendMessageBatchRequestEntry::builder().id((n - from).to_string()).message_body(body);
            if with_ids {
                let attribute = |value: String| {
                    MessageAttributeValue::builder().data_type("String").string_value(value).build().expect("complete")
                };
                entry = entry
                    .message_attributes("ce-id", attribute(format!("0190a0a0-0000-7000-8000-{n:012x}")))
                    .message_attributes("ce-time", attribute("2023-11-14T22:13:20.123000000Z".to_owned()));
            }
            batch = batch.entries(entry.build().expect("complete"));
        }
        let answer = batch.send().await.expect("an answer");
        assert!(answer.failed.is_empty(), "{:?}", answer.failed);
    });
    requests.buffer_unordered(REQUESTS).collect::<()>().await;
}

/// Puts messages where a consumer will find them.
pub async fn fill(options: &Options, client: &Client, url: &str) {
    send(client, url, &text(options), options.messages(), false).await;
}

/// Fails unless the queue comes to hold so many messages, lent ones included.
pub async fn expect_left(client: &Client, url: &str, messages: u64) {
    let began = Instant::now();
    loop {
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        ];
        let request = client.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
        let found = request.send().await.expect("an answer").attributes.expect("attributes");
        let left: u64 = found.values().map(|count| count.parse::<u64>().expect("a number")).sum();
        if left == messages {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "{left} messages are in the queue, not {messages}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn published(options: Options, with_ids: bool) -> Numbers {
    let client = client(&options);
    let url = create(&client, &queue()).await;
    let body = text(&options);
    let meter = Meter::start(&options);
    send(&client, &url, &body, options.messages(), with_ids).await;
    let numbers = meter.stop(options.messages());
    expect_left(&client, &url, options.messages()).await;
    delete(&client, &url).await;
    numbers
}

pub async fn publish(options: Options) -> Numbers {
    published(options, false).await
}

pub async fn publish_with_ids(options: Options) -> Numbers {
    published(options, true).await
}

/// Messages of one poll.
pub async fn poll(client: &Client, url: &str) -> Vec<Message> {
    let request = client.receive_message().queue_url(url).max_number_of_messages(BATCH as i32).wait_time_seconds(20);
    // What polymq asks for too: the attributes of the message, and how often it was delivered.
    let request = request.message_attribute_names("All");
    let request = request.message_system_attribute_names(aws_sdk_sqs::types::MessageSystemAttributeName::All);
    request.send().await.expect("an answer").messages.unwrap_or_default()
}

pub async fn acknowledge(client: &Client, url: &str, messages: Vec<Message>) {
    let mut batch = client.delete_message_batch().queue_url(url);
    for (at, message) in messages.into_iter().enumerate() {
        let entry = DeleteMessageBatchRequestEntry::builder().id(at.to_string());
        batch = batch.entries(entry.set_receipt_handle(message.receipt_handle).build().expect("complete"));
    }
    let answer = batch.send().await.expect("an answer");
    assert!(answer.failed.is_empty(), "{:?}", answer.failed);
}

pub async fn consume(options: Options) -> Numbers {
    let client = client(&options);
    let url = create(&client, &queue()).await;
    fill(&options, &client, &url).await;
    for _ in 0..REQUESTS {
        let (client, url) = (client.clone(), url.clone());
        tokio::spawn(async move {
            let mut deleting = None::<tokio::task::JoinHandle<()>>;
            while LATCH.remaining() > 0 {
                let messages = poll(&client, &url).await;
                messages.iter().for_each(|message| handled(message.body().unwrap_or_default().as_bytes()));
                // The next poll does not wait for it, the next but one does.
                if let Some(before) = deleting.take() {
                    before.await.expect("no panic");
                }
                if !messages.is_empty() {
                    let (client, url) = (client.clone(), url.clone());
                    deleting = Some(tokio::spawn(async move { acknowledge(&client, &url, messages).await }));
                }
            }
            if let Some(last) = deleting {
                last.await.expect("no panic");
            }
        });
    }
    let numbers = all_handled(options.messages()).await;
    expect_left(&client, &url, 0).await;
    numbers
}

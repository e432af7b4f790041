//! polymq's broker by the stub of its protocol: queue streams, up and down.

use bytes::Bytes;
use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled, handled, payload, spread, workers},
};
use polymq_kubemq_proto::{
    QueueMessage, QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind, QueuesInfoRequest,
    QueuesUpstreamRequest, QueuesUpstreamResponse, Request, kubemq_client::KubemqClient, request::RequestType,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::{latency as beat, queue};

pub type Client = KubemqClient<Channel>;

pub async fn connect(options: &Options) -> Client {
    connect_to(options.need("url")).await.expect("a broker")
}

pub async fn connect_to(url: &str) -> Result<Client, tonic::transport::Error> {
    let endpoint = Channel::from_shared(url.to_owned()).expect("a URL").tcp_nodelay(true);
    let endpoint = endpoint.initial_stream_window_size(4 << 20).initial_connection_window_size(8 << 20);
    Ok(KubemqClient::new(endpoint.connect().await?).max_decoding_message_size(usize::MAX))
}

fn message(queue: &str, body: &Bytes) -> QueueMessage {
    QueueMessage { client_id: "bench".into(), channel: queue.into(), body: body.clone(), ..QueueMessage::default() }
}

/// A stream of sends.
struct Upstream {
    requests: mpsc::Sender<QueuesUpstreamRequest>,
    answers: Streaming<QueuesUpstreamResponse>,
}

impl Upstream {
    async fn open(client: &mut Client) -> Self {
        let (requests, stream) = mpsc::channel(WINDOW);
        let answers = client.queues_upstream(ReceiverStream::new(stream)).await.expect("a stream").into_inner();
        Self { requests, answers }
    }

    async fn send(&self, messages: Vec<QueueMessage>) {
        let request = QueuesUpstreamRequest { request_id: "r".into(), messages };
        self.requests.send(request).await.expect("the stream is open");
    }

    /// Waits for the next answer; tells how many messages it confirms.
    async fn confirmed(&mut self) -> u64 {
        let answer = self.answers.message().await.expect("no error").expect("an answer");
        assert!(!answer.is_error && answer.results.iter().all(|result| !result.is_error), "{answer:?}");
        answer.results.len() as u64
    }
}

/// Sends with a window of unconfirmed messages, so many in one request.
async fn send_window(client: &mut Client, queue: &str, body: &Bytes, messages: u64, batch: u64) {
    let mut upstream = Upstream::open(client).await;
    let (mut sent, mut confirmed) = (0, 0);
    while confirmed < messages {
        while sent < messages && sent + batch <= confirmed + WINDOW as u64 {
            let count = batch.min(messages - sent);
            upstream.send((0..count).map(|_| message(queue, body)).collect()).await;
            sent += count;
        }
        confirmed += upstream.confirmed().await;
    }
}

/// Fails unless the queue comes to hold so many messages; then it is removed.
async fn expect_left(client: &mut Client, queue: &str, messages: u64) {
    let mut found = 0;
    for _ in 0..50 {
        let info = client.queues_info(QueuesInfoRequest { queue_name: queue.into(), ..QueuesInfoRequest::default() });
        let info = info.await.expect("an answer").into_inner().info.expect("there");
        found = info.queues.iter().map(|queue| queue.messages).sum::<i64>().unsigned_abs();
        if found == messages {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(found, messages, "messages in {queue}");
    let tags = [("channel_type", "queues"), ("channel", queue)];
    let delete = Request {
        request_type_data: RequestType::Query.into(),
        client_id: "bench".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: "delete-channel".into(),
        timeout: 20_000,
        tags: tags.map(|(name, value)| (name.into(), value.into())).into(),
        ..Request::default()
    };
    let answer = client.send_request(delete).await.expect("an answer").into_inner();
    assert!(answer.executed, "{}", answer.error);
}

pub async fn fill(url: &str, queue: &str, body: &Bytes, messages: u64) {
    let mut client = connect_to(url).await.expect("a broker");
    send_window(&mut client, queue, body, messages, WINDOW as u64 / 2).await;
}

pub async fn publish(options: Options) -> Numbers {
    let mut clients = Vec::new();
    for _ in 0..workers(&options) {
        clients.push(connect(&options).await);
    }
    let body: Bytes = payload(&options).into();
    let pool = std::sync::Mutex::new(clients.clone());
    let batch = options.get("batch", 1);
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let mut client = pool.lock().expect("no panic").pop().expect("one a worker");
        let body = body.clone();
        async move { send_window(&mut client, &queue(), &body, share, batch).await }
    })
    .await;
    let numbers = meter.stop(options.messages());
    expect_left(&mut clients[0], &queue(), options.messages()).await;
    numbers
}

/// Polls, two of them open so that one is on its way while the other one's messages are handled.
async fn receive(mut client: Client, polls: usize, most: i32, handle: fn(&[u8])) {
    let (requests, stream) = mpsc::channel(16);
    let mut answers = client.queues_downstream(ReceiverStream::new(stream)).await.expect("a stream").into_inner();
    let request = |kind: Kind| QueuesDownstreamRequest {
        request_id: "r".into(),
        client_id: "bench".into(),
        channel: queue(),
        request_type_data: kind.into(),
        max_items: most,
        wait_timeout: 60_000,
        ..QueuesDownstreamRequest::default()
    };
    for _ in 0..polls {
        requests.send(request(Kind::Get)).await.expect("open");
    }
    while let Some(answer) = answers.message().await.expect("no error") {
        assert!(!answer.is_error, "{}", answer.error);
        requests.send(request(Kind::Get)).await.expect("open");
        if answer.messages.is_empty() {
            // The queue was deleted: the measurement is over.
            return;
        }
        answer.messages.iter().for_each(|message| handle(&message.body));
        let ack = QueuesDownstreamRequest { ref_transaction_id: answer.transaction_id, ..request(Kind::AckAll) };
        requests.send(ack).await.expect("open");
    }
}

pub async fn consume(options: Options) -> Numbers {
    fill(options.need("url"), &queue(), &payload(&options).into(), options.messages()).await;
    let mut clients = Vec::new();
    for _ in 0..workers(&options) {
        clients.push(connect(&options).await);
    }
    for client in clients.clone() {
        tokio::spawn(receive(client, 2, WINDOW as i32 / 2, handled));
    }
    let numbers = all_handled(options.messages()).await;
    expect_left(&mut clients[0], &queue(), 0).await;
    numbers
}

pub async fn latency(options: Options) -> Numbers {
    for _ in 0..workers(&options) {
        tokio::spawn(receive(connect(&options).await, 1, WINDOW as i32, beat::arrived));
    }
    let mut client = connect(&options).await;
    let mut upstreams = Vec::new();
    for _ in 0..workers(&options) {
        upstreams.push(Upstream::open(&mut connect(&options).await).await);
    }
    beat::prepared().await;
    for (sender, mut upstream) in (0..).zip(upstreams) {
        let options = options.clone();
        tokio::spawn(async move {
            let requests = upstream.requests.clone();
            tokio::spawn(async move {
                loop {
                    upstream.confirmed().await;
                }
            });
            let mut beat = beat::beat(&options, sender);
            for _ in (sender..options.messages()).step_by(workers(&options) as usize) {
                beat.tick().await;
                let messages = vec![message(&queue(), &beat::stamp(&options))];
                let request = QueuesUpstreamRequest { request_id: "r".into(), messages };
                requests.send(request).await.expect("open");
            }
            std::future::pending::<()>().await;
        });
    }
    let numbers = beat::taken().await;
    expect_left(&mut client, &queue(), 0).await;
    numbers
}

/// Whether a broker answers.
pub async fn answers(url: &str) -> bool {
    let Ok(mut client) = connect_to(url).await else { return false };
    client.ping(polymq_kubemq_proto::Empty {}).await.is_ok()
}

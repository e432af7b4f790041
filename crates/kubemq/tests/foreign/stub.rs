//! A server that is not polymq's: around a broker that keeps the messages, it does what the Community server and older ones
//! do in another way.
//!
//! - Streams are confirmed by their first answer, not when they are there.
//! - Channels are not managed; a request for it has no answer.
//! - A poll takes its whole time, 1 s at least, although messages are there.
//! - A question for a transaction's status is not known, and `CloseByClient` gives everything back.
//! - A client id reads one stored channel at a time, whatever its name.
//! - Requests of foreign clients may have no id.

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, future::ready, stream};
use polymq_broker::{Broker, Limits};
use polymq_kubemq_proto::{
    self as proto, QueuesDownstreamRequestType as Kind, QueuesDownstreamResponse,
    kubemq_client::KubemqClient,
    kubemq_server::{Kubemq, KubemqServer},
    subscribe::SubscribeType,
};
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server},
};

/// Where channels would be managed.
const ADMIN: &str = "kubemq.cluster.internal.requests";

/// In what else it differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Age {
    /// As the Community server.
    Community,
    /// Before 2.2: no `QueuesUpstream`, `QueuesDownstream` or `QueuesInfo`.
    Old,
}

/// What a test sees of it.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Requests to manage channels.
    pub(crate) managed: AtomicUsize,
    /// Everything stored before this was forgotten, in nanoseconds since 1970: of queues, and of events.
    forgotten: (AtomicI64, AtomicI64),
    reading: Mutex<HashSet<String>>,
}

/// The server; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) url: String,
    pub(crate) seen: Arc<Seen>,
    _broker: Broker,
    server: JoinHandle<()>,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Foreign {
    pub(crate) async fn start(age: Age) -> Self {
        // A queue takes a thousand messages: there are refusals to see.
        let limits = Limits { queue_count: Some(1000), ..Limits::default() };
        let broker = Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.expect("a broker");
        let endpoint = Channel::from_shared(format!("http://{}", broker.address())).expect("a URL");
        let inner = KubemqClient::new(endpoint.connect().await.expect("connect"));
        let seen = Arc::new(Seen::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("kubemq://{}", listener.local_addr().expect("an address"));
        let service = KubemqServer::new(Stub { inner, age, seen: Arc::clone(&seen) });
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { serving.await.expect("served") });
        Self { url, seen, _broker: broker, server }
    }

    /// As after a day: what is in queues now is gone, and what is in stored channels where `events` says so.
    pub(crate) fn forget(&self, events: bool) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos();
        let now = i64::try_from(now).expect("before 2262");
        self.seen.forgotten.0.store(now, SeqCst);
        if events {
            self.seen.forgotten.1.store(now, SeqCst);
        }
    }
}

struct Stub {
    inner: KubemqClient<Channel>,
    age: Age,
    seen: Arc<Seen>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The answer of a stream that is confirmed by its first item.
async fn withheld<T: Send + 'static>(mut answers: Answers<T>) -> Result<Response<Answers<T>>, Status> {
    let first = answers.next().await.transpose()?;
    Ok(Response::new(Box::pin(stream::iter(first.map(Ok)).chain(answers))))
}

fn readable<T>(requests: Streaming<T>) -> impl Stream<Item = T> {
    requests.take_while(|request| ready(request.is_ok())).filter_map(|request| ready(request.ok()))
}

/// A client id that reads; free again when this is dropped.
struct Reading(Arc<Seen>, String);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.lock().expect("a lock").remove(&self.1);
    }
}

impl Stub {
    fn knows(&self, method: &str) -> Result<KubemqClient<Channel>, Status> {
        if self.age == Age::Old {
            return Err(Status::unimplemented(format!("unknown method {method} for service kubemq.kubemq")));
        }
        Ok(self.inner.clone())
    }

    fn reading(&self, subscribe: &proto::Subscribe) -> Result<Option<Reading>, Status> {
        if subscribe.subscribe_type_data() != SubscribeType::EventsStore {
            return Ok(None);
        }
        let id = subscribe.client_id.clone();
        if !self.seen.reading.lock().expect("a lock").insert(id.clone()) {
            return Err(Status::internal("stan: clientID already registered"));
        }
        Ok(Some(Reading(Arc::clone(&self.seen), id)))
    }
}

/// How one stream of polls differs.
struct Polls {
    seen: Arc<Seen>,
    /// When polls may be answered, and what is not known.
    due: Mutex<HashMap<String, Instant>>,
    unknown: Mutex<HashSet<String>>,
}

impl Polls {
    fn asked(&self, mut request: proto::QueuesDownstreamRequest) -> proto::QueuesDownstreamRequest {
        match request.request_type_data() {
            Kind::Get => {
                request.wait_timeout = request.wait_timeout.max(1000);
                let wait = Duration::from_millis(u64::try_from(request.wait_timeout).expect("positive"));
                self.due.lock().expect("a lock").insert(request.request_id.clone(), Instant::now() + wait);
            }
            Kind::TransactionStatus => {
                self.unknown.lock().expect("a lock").insert(request.request_id.clone());
            }
            Kind::CloseByClient => request.sequence_range.clear(),
            _ => {}
        }
        request
    }

    async fn answered(&self, mut answer: QueuesDownstreamResponse) -> QueuesDownstreamResponse {
        let id = answer.ref_request_id.clone();
        let due = self.due.lock().expect("a lock").remove(&id);
        if let Some(due) = due {
            tokio::time::sleep_until(due).await;
            let forgotten = self.seen.forgotten.0.load(SeqCst);
            let stored = |message: &proto::QueueMessage| message.attributes.as_ref().map_or(0, |it| it.timestamp);
            answer.messages.retain(|message| stored(message) >= forgotten);
        }
        if self.unknown.lock().expect("a lock").remove(&id) {
            answer = QueuesDownstreamResponse {
                ref_request_id: id,
                is_error: true,
                error: "request unknown".to_owned(),
                ..QueuesDownstreamResponse::default()
            };
        }
        answer
    }
}

#[tonic::async_trait]
impl Kubemq for Stub {
    type SendEventsStreamStream = Answers<proto::Result>;
    type SubscribeToEventsStream = Answers<proto::EventReceive>;
    type SubscribeToRequestsStream = Answers<proto::Request>;
    type StreamQueueMessageStream = Answers<proto::StreamQueueMessagesResponse>;
    type QueuesDownstreamStream = Answers<proto::QueuesDownstreamResponse>;
    type QueuesUpstreamStream = Answers<proto::QueuesUpstreamResponse>;

    async fn ping(&self, _: Request<proto::Empty>) -> Result<Response<proto::PingResult>, Status> {
        let version = if self.age == Age::Old { "2.1.0" } else { "2.4.0" };
        let about = proto::PingResult { host: "foreign".into(), version: version.into(), ..Default::default() };
        Ok(Response::new(about))
    }

    async fn queues_info(
        &self,
        request: Request<proto::QueuesInfoRequest>,
    ) -> Result<Response<proto::QueuesInfoResponse>, Status> {
        self.knows("QueuesInfo")?.queues_info(request.into_inner()).await
    }

    async fn send_request(&self, request: Request<proto::Request>) -> Result<Response<proto::Response>, Status> {
        let request = request.into_inner();
        if request.channel == ADMIN {
            // Nobody listens there. (The Community server takes the whole time-out to say so.)
            self.seen.managed.fetch_add(1, SeqCst);
            return Err(Status::internal("Error 301: timeout for request message"));
        }
        self.inner.clone().send_request(request).await
    }

    async fn subscribe_to_requests(
        &self,
        request: Request<proto::Subscribe>,
    ) -> Result<Response<Self::SubscribeToRequestsStream>, Status> {
        let requests = self.inner.clone().subscribe_to_requests(request.into_inner()).await?.into_inner();
        let without_id = |request: proto::Request| proto::Request { request_id: String::new(), ..request };
        withheld(Box::pin(requests.map(move |request| request.map(without_id)))).await
    }

    async fn send_response(&self, request: Request<proto::Response>) -> Result<Response<proto::Empty>, Status> {
        self.inner.clone().send_response(request.into_inner()).await
    }

    async fn send_event(&self, request: Request<proto::Event>) -> Result<Response<proto::Result>, Status> {
        self.inner.clone().send_event(request.into_inner()).await
    }

    async fn send_events_stream(
        &self,
        request: Request<Streaming<proto::Event>>,
    ) -> Result<Response<Self::SendEventsStreamStream>, Status> {
        withheld(self.inner.clone().send_events_stream(readable(request.into_inner())).await?.into_inner().boxed())
            .await
    }

    async fn subscribe_to_events(
        &self,
        request: Request<proto::Subscribe>,
    ) -> Result<Response<Self::SubscribeToEventsStream>, Status> {
        let subscribe = request.into_inner();
        let reading = self.reading(&subscribe)?;
        let events = self.inner.clone().subscribe_to_events(subscribe).await?.into_inner();
        let forgotten = self.seen.forgotten.1.load(SeqCst);
        let kept = events.filter(move |event| {
            let _reading = &reading;
            ready(event.as_ref().map_or(true, |event| event.sequence == 0 || event.timestamp >= forgotten))
        });
        withheld(Box::pin(kept)).await
    }

    async fn send_queue_message(
        &self,
        request: Request<proto::QueueMessage>,
    ) -> Result<Response<proto::SendQueueMessageResult>, Status> {
        self.inner.clone().send_queue_message(request.into_inner()).await
    }

    async fn send_queue_messages_batch(
        &self,
        request: Request<proto::QueueMessagesBatchRequest>,
    ) -> Result<Response<proto::QueueMessagesBatchResponse>, Status> {
        self.inner.clone().send_queue_messages_batch(request.into_inner()).await
    }

    async fn receive_queue_messages(
        &self,
        request: Request<proto::ReceiveQueueMessagesRequest>,
    ) -> Result<Response<proto::ReceiveQueueMessagesResponse>, Status> {
        self.inner.clone().receive_queue_messages(request.into_inner()).await
    }

    async fn ack_all_queue_messages(
        &self,
        request: Request<proto::AckAllQueueMessagesRequest>,
    ) -> Result<Response<proto::AckAllQueueMessagesResponse>, Status> {
        self.inner.clone().ack_all_queue_messages(request.into_inner()).await
    }

    async fn stream_queue_message(
        &self,
        request: Request<Streaming<proto::StreamQueueMessagesRequest>>,
    ) -> Result<Response<Self::StreamQueueMessageStream>, Status> {
        let answers = self.inner.clone().stream_queue_message(readable(request.into_inner())).await?;
        withheld(answers.into_inner().boxed()).await
    }

    async fn queues_upstream(
        &self,
        request: Request<Streaming<proto::QueuesUpstreamRequest>>,
    ) -> Result<Response<Self::QueuesUpstreamStream>, Status> {
        let answers = self.knows("QueuesUpstream")?.queues_upstream(readable(request.into_inner())).await?;
        // What is refused as a whole is told once, without results.
        let once = |mut answer: proto::QueuesUpstreamResponse| {
            if answer.results.iter().all(|result| result.is_error) {
                answer.error = answer.results.pop().map(|result| result.error).unwrap_or_default();
                (answer.is_error, answer.results) = (true, Vec::new());
            }
            answer
        };
        withheld(Box::pin(answers.into_inner().map(move |answer| answer.map(once)))).await
    }

    async fn queues_downstream(
        &self,
        request: Request<Streaming<proto::QueuesDownstreamRequest>>,
    ) -> Result<Response<Self::QueuesDownstreamStream>, Status> {
        let mut inner = self.knows("QueuesDownstream")?;
        let polls = Polls { seen: Arc::clone(&self.seen), due: Mutex::default(), unknown: Mutex::default() };
        let polls = Arc::new(polls);
        let asking = Arc::clone(&polls);
        let requests = readable(request.into_inner()).map(move |request| asking.asked(request));
        let answers = inner.queues_downstream(requests).await?.into_inner().then(move |answer| {
            let polls = Arc::clone(&polls);
            async move {
                match answer {
                    Ok(answer) => Ok(polls.answered(answer).await),
                    Err(status) => Err(status),
                }
            }
        });
        withheld(Box::pin(answers)).await
    }
}

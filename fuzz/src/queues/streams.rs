//! Streams of polls: what was asked for over each and is not answered yet.

use std::{collections::BTreeMap, future::pending};

use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamResponse};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{PATIENCE, model::Model};

/// A poll without an answer.
pub(super) struct Asked {
    pub(super) channel: String,
    pub(super) most: i32,
    pub(super) auto_ack: bool,
    /// It ends with a message only, as far as an input lasts.
    pub(super) long: bool,
}

pub(super) struct Downstream {
    /// None when the client sends nothing more.
    pub(super) requests: Option<mpsc::Sender<QueuesDownstreamRequest>>,
    answers: Streaming<QueuesDownstreamResponse>,
    /// By the ids of their requests.
    pub(super) polls: BTreeMap<String, Asked>,
}

impl Downstream {
    /// The next answer; `None` is the end of the stream.
    pub(super) async fn next(&mut self) -> Option<QueuesDownstreamResponse> {
        timeout(PATIENCE, self.answers.message()).await.expect("in time").unwrap()
    }
}

/// The next answer of a stream on which one is expected.
async fn expected(stream: &mut Option<Downstream>) -> QueuesDownstreamResponse {
    match stream {
        Some(open) if !open.polls.is_empty() => open.answers.message().await.unwrap().expect("polls are answered"),
        _ => pending().await,
    }
}

impl Model {
    /// A stream, which is opened when it is not.
    pub(super) async fn open(&mut self, stream: usize) -> &mut Downstream {
        if self.streams[stream].is_none() {
            let (requests, receiver) = mpsc::channel(4);
            let answers = self.client.queues_downstream(ReceiverStream::new(receiver)).await.unwrap().into_inner();
            self.streams[stream] = Some(Downstream { requests: Some(requests), answers, polls: BTreeMap::new() });
        }
        self.streams[stream].as_mut().expect("opened")
    }

    pub(super) async fn request(&mut self, stream: usize, request: QueuesDownstreamRequest) {
        let open = self.open(stream).await;
        open.requests.as_ref().expect("it is not finished").send(request).await.unwrap();
    }

    /// The answer to a request that is no poll. Polls are answered whenever they have something.
    pub(super) async fn answer(&mut self, stream: usize, ids: &[&str]) -> QueuesDownstreamResponse {
        loop {
            let answer = self.open(stream).await.next().await.expect("an answer");
            if ids.contains(&&*answer.ref_request_id) {
                return answer;
            }
            self.polled(stream, answer);
        }
    }

    /// The polls that wait at a queue: how many, and whether all of them do until something comes.
    fn waits(&self, channel: &str) -> (usize, bool) {
        let polls = self.streams.iter().flatten().flat_map(|open| open.polls.values());
        let polls: Vec<_> = polls.filter(|poll| poll.channel == channel).collect();
        (polls.len(), polls.iter().all(|poll| poll.long))
    }

    /// Until no poll waits at a queue. Where all of them wait for a message some are sent at once, and must be taken.
    pub(super) async fn resolve(&mut self, queue: u8) {
        let channel = self.queue(queue);
        loop {
            let (waits, long) = self.waits(&channel);
            if waits == 0 {
                return;
            }
            if long {
                self.upstream(queue, waits as u8, 0).await;
            }
            let (mut taken, mut left) = (0, waits);
            while left > 0 && (if long { taken < waits } else { left == waits }) {
                taken += self.one_answer(&channel).await;
                left = self.waits(&channel).0;
            }
        }
    }

    /// One answer to a poll on any stream; tells how many messages of a queue it has.
    async fn one_answer(&mut self, channel: &str) -> usize {
        let [one, other] = &mut self.streams;
        let next = async {
            tokio::select! {
                answer = expected(one) => (0, answer),
                answer = expected(other) => (1, answer),
            }
        };
        let (stream, answer) = timeout(PATIENCE, next).await.expect("whoever waits gets what comes");
        let taken = answer.messages.iter().filter(|message| message.channel == channel).count();
        self.polled(stream, answer);
        taken
    }

    /// The queues at which polls of a stream wait.
    fn waited_for(&self, stream: usize, wanted: impl Fn(&Asked) -> bool) -> Vec<u8> {
        let polls = self.streams[stream].iter().flat_map(|open| open.polls.values()).filter(|poll| wanted(poll));
        let channels: Vec<_> = polls.map(|poll| poll.channel.clone()).collect();
        (0..super::QUEUES as u8).filter(|queue| channels.contains(&self.queue(*queue))).collect()
    }

    /// What a poll with automatic acknowledgement takes while its stream breaks is gone: these are answered before.
    pub(crate) async fn part(&mut self, stream: usize) {
        for queue in self.waited_for(stream, |poll| poll.auto_ack) {
            self.resolve(queue).await;
        }
    }

    /// A stream breaks.
    pub(super) async fn break_off(&mut self, stream: usize) {
        self.part(stream).await;
        self.streams[stream] = None;
        self.transactions.retain(|transaction| transaction.stream != stream);
    }

    /// The client's side ends: polls are answered all the same, then everything is given back and the stream ends.
    pub(super) async fn finish_stream(&mut self, stream: usize) {
        let Some(open) = &mut self.streams[stream] else { return };
        open.requests = None;
        let gone = self.transactions.extract_if(.., |transaction| transaction.stream == stream);
        self.over.extend(gone.map(|transaction| transaction.id));
        for queue in self.waited_for(stream, |_| true) {
            self.resolve(queue).await;
        }
        let mut open = self.streams[stream].take().expect("still open");
        assert!(open.next().await.is_none(), "the stream ends after its polls");
    }
}

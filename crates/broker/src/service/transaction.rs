//! `StreamQueueMessage`: the older transactions, one message a stream, held for a visibility time.
//!
//! Every request has one answer of its kind. After a final operation the answer comes first and then the end of the
//! stream, at once: old SDKs wait for it without a time-out of their own.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use polymq_kubemq_proto::{StreamQueueMessagesRequest, StreamQueueMessagesResponse, StreamRequestType as Kind};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{
    Answers,
    downstream::{LAST_WORDS, SILENCE},
    unary,
};
use crate::{
    access::Caller,
    broker::Shared,
    limits::DEFAULT_VISIBILITY,
    names,
    queue::Lent,
    queues::within,
    refusal::Refusal,
    rules::{Action, Resource},
};

/// Bytes of the id of a request.
const ID: usize = 1024;

type Sender = mpsc::Sender<Result<StreamQueueMessagesResponse, Status>>;

/// Where a stream is after a request.
enum Next {
    Goes,
    Ends,
}

struct Transaction {
    shared: Arc<Shared>,
    caller: Caller,
    held: Option<Lent>,
    until: Instant,
    /// Of the last request: what the server says unasked refers to it.
    last: (String, Kind),
}

pub(super) fn serve(
    shared: Arc<Shared>,
    caller: Caller,
    mut requests: Streaming<StreamQueueMessagesRequest>,
) -> Answers<StreamQueueMessagesResponse> {
    let (answers, stream) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut transaction =
            Transaction { shared, caller, held: None, until: Instant::now(), last: (String::new(), Kind::Unknown) };
        transaction.run(&mut requests, &answers).await;
        // A client that went away has had its delivery: to the tail, counted. When it is the broker that goes, the
        // message stays where it was.
        if let Some(lent) = transaction.held.take()
            && !transaction.shared.stopping.is_cancelled()
            && let Err(cause) = transaction.shared.queues.reject(lent).await
        {
            tracing::warn!(%cause, "a message of a stream that ended is back at its place");
        }
    });
    Box::pin(ReceiverStream::new(stream))
}

impl Transaction {
    async fn run(&mut self, requests: &mut Streaming<StreamQueueMessagesRequest>, answers: &Sender) {
        let stopping = self.shared.stopping.clone();
        loop {
            let (until, holds) = (self.until, self.held.is_some());
            tokio::select! {
                request = requests.next() => {
                    let request = match request {
                        Some(Ok(request)) => request,
                        Some(Err(status)) => return drop(answers.try_send(Err(status))),
                        None => return,
                    };
                    if matches!(self.serve(request, answers).await, Next::Ends) {
                        return;
                    }
                }
                () = sleep_until(until), if holds => {
                    let _ = answers.send(Ok(self.refused(&Refusal::visibility_expired()))).await;
                    return;
                }
                () = answers.closed() => return,
                () = stopping.cancelled() => break,
            }
        }
        // The broker stops: what was asked for already with what is held still counts, and is answered.
        let bound = sleep(LAST_WORDS);
        tokio::pin!(bound);
        while self.held.is_some()
            && let Ok(Some(Ok(request))) = tokio::select! {
                request = timeout(SILENCE, requests.next()) => request,
                () = &mut bound => return,
            }
        {
            if matches!(self.serve(request, answers).await, Next::Ends) {
                return;
            }
        }
    }

    /// Does what one request asks for, and answers it.
    async fn serve(&mut self, request: StreamQueueMessagesRequest, answers: &Sender) -> Next {
        // It is kept while nothing else is counted.
        if request.request_id.len() > ID {
            let _ = answers.try_send(Err(Status::invalid_argument(format!(
                "a request id has {} bytes, {ID} are allowed",
                request.request_id.len()
            ))));
            return Next::Ends;
        }
        self.last = (request.request_id.clone(), request.stream_request_type_data());
        let stopping = self.shared.stopping.clone();
        // Only waiting for a message ends with the broker: anything else is done and answered, or its client could not know.
        let waits = self.last.1 == Kind::ReceiveMessage;
        let result = tokio::select! {
            result = self.handle(request) => result,
            () = answers.closed() => return Next::Ends,
            () = stopping.cancelled(), if waits => return Next::Ends,
        };
        let (answer, next) = match result {
            Ok((answer, next)) => (answer, next),
            Err((refusal, next)) => (self.refused(&refusal), next),
        };
        if answers.send(Ok(answer)).await.is_err() { Next::Ends } else { next }
    }

    fn answer(&self) -> StreamQueueMessagesResponse {
        StreamQueueMessagesResponse {
            request_id: self.last.0.clone(),
            stream_request_type_data: self.last.1.into(),
            ..StreamQueueMessagesResponse::default()
        }
    }

    fn refused(&self, refusal: &Refusal) -> StreamQueueMessagesResponse {
        StreamQueueMessagesResponse { is_error: true, error: refusal.to_string(), ..self.answer() }
    }

    async fn handle(
        &mut self,
        request: StreamQueueMessagesRequest,
    ) -> Result<(StreamQueueMessagesResponse, Next), (Refusal, Next)> {
        let goes = |refusal| (refusal, Next::Goes);
        if request.client_id.is_empty() {
            return Err(goes(Refusal::no_client()));
        }
        match request.stream_request_type_data() {
            Kind::ReceiveMessage => return self.receive(&request).await,
            Kind::AckMessage => {
                let lent = self.take(&request, Refusal::nothing_to_ack()).map_err(goes)?;
                lent.remove().await.map_err(|cause| (cause.into(), Next::Ends))?;
            }
            Kind::RejectMessage => {
                let lent = self.take(&request, Refusal::nothing_to_reject()).map_err(goes)?;
                self.shared.queues.reject(lent).await.map_err(|refusal| (refusal, Next::Ends))?;
            }
            Kind::ModifyVisibility => {
                self.holds(Refusal::nothing_to_ack()).map_err(goes)?;
                self.until = Instant::now() + self.visibility(request.visibility_seconds).map_err(goes)?;
                return Ok((self.answer(), Next::Goes));
            }
            Kind::ResendMessage => {
                self.holds(Refusal::nothing_to_send()).map_err(goes)?;
                names::check_queue(&request.channel).map_err(goes)?;
                self.may(Action::Write, &request).map_err(goes)?;
                // Where there is no such queue and no room for one, the message stays held.
                self.shared.queues.get(&request.channel).map_err(|_| goes(Refusal::not_resent()))?;
                if let Some(lent) = self.held.take() {
                    let resent = self.shared.queues.requeue(lent, &request.channel, false).await;
                    resent.map_err(|_| (Refusal::not_resent(), Next::Ends))?;
                }
            }
            Kind::SendModifiedMessage => {
                self.holds(Refusal::nothing_to_ack()).map_err(goes)?;
                let message = request.modified_message.ok_or_else(|| goes(Refusal::no_message()))?;
                let may = |message: &_| unary::may_send(&self.caller, message);
                let replaced = self.shared.queues.replace(&mut self.held, message, may).await;
                let next = if self.held.is_some() { Next::Goes } else { Next::Ends };
                replaced.map_err(|refusal| (refusal, next))?;
            }
            Kind::Unknown => return Err(goes(Refusal::stream_request())),
        }
        Ok((self.answer(), Next::Ends))
    }

    async fn receive(
        &mut self,
        request: &StreamQueueMessagesRequest,
    ) -> Result<(StreamQueueMessagesResponse, Next), (Refusal, Next)> {
        let goes = |refusal| (refusal, Next::Goes);
        if self.held.is_some() {
            return Err(goes(Refusal::already_active()));
        }
        names::check_queue(&request.channel).map_err(goes)?;
        self.may(Action::Read, request).map_err(goes)?;
        let visibility = self.visibility(request.visibility_seconds).map_err(goes)?;
        let wait = unary::wait(request.wait_time_seconds, self.shared.queues.limits().wait).map_err(goes)?;
        let queue = self.shared.queues.get(&request.channel).map_err(goes)?;
        let taken = queue.take(1, Instant::now() + wait).await.map_err(|cause| (cause.into(), Next::Ends))?;
        let Some(lent) = taken.messages.into_iter().next() else {
            return Err((Refusal::nothing_came(), Next::Ends));
        };
        let answer = StreamQueueMessagesResponse { message: Some(lent.message()), ..self.answer() };
        self.held = Some(lent);
        self.until = Instant::now() + visibility;
        Ok((answer, Next::Goes))
    }

    fn may(&self, action: Action, request: &StreamQueueMessagesRequest) -> Result<(), Refusal> {
        self.caller.may(action, Resource::Queues, &request.client_id, &request.channel)
    }

    fn holds(&self, otherwise: Refusal) -> Result<(), Refusal> {
        if self.held.is_some() { Ok(()) } else { Err(otherwise) }
    }

    fn take(&mut self, request: &StreamQueueMessagesRequest, otherwise: Refusal) -> Result<Lent, Refusal> {
        match self.held.take() {
            Some(lent) if lent.sequence() == request.ref_sequence => Ok(lent),
            Some(lent) => {
                self.held = Some(lent);
                Err(Refusal::wrong_sequence())
            }
            None => Err(otherwise),
        }
    }

    fn visibility(&self, seconds: i32) -> Result<Duration, Refusal> {
        match within(seconds, self.shared.queues.limits().visibility) {
            Some(Duration::ZERO) => Ok(DEFAULT_VISIBILITY),
            Some(visibility) => Ok(visibility),
            None => Err(Refusal::visibility()),
        }
    }
}

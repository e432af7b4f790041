//! Receiving: a background task per consumer that polls, extends loans, and tells SQS what was settled.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use polymq_core::{Consumer, ErrorKind, Incoming, Result, Settler};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use crate::{
    backend::BATCH,
    clients::Live,
    convert,
    error::Effect,
    link::Link,
    poll::{Reading, Url},
    producer::CLOSE_TIMEOUT,
    requests::{Context, Done, PAUSE, Told, changing, copying, deleting, polling},
    settle::{self, SqsSettler},
    shared::{Held, Shared, final_error, queue_gone},
    topology::{self, Plan},
};

/// How long returning what handlers still held may take, after closing has waited for long polls.
const RETURN_TIMEOUT: Duration = Duration::from_secs(2);

/// A consumer of a queue.
#[derive(Debug)]
pub(crate) struct SqsConsumer {
    shared: Arc<Shared>,
    settler: Arc<SqsSettler>,
    handle: ConsumerHandle,
}

/// What the connection needs to close a consumer that is still open.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerHandle {
    shared: Arc<Shared>,
    /// How far the task has come.
    stage: watch::Receiver<Stage>,
}

/// How far a consumer's task has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Reading,
    /// Nothing is fetched any more, and what was not received is back.
    Returned,
    Ended,
}

impl ConsumerHandle {
    pub(crate) fn is_gone(&self) -> bool {
        *self.stage.borrow() == Stage::Ended
    }

    /// Ends it, settled or not.
    pub(crate) async fn close(mut self) {
        let end = Instant::now() + CLOSE_TIMEOUT + RETURN_TIMEOUT;
        self.shared.start_close();
        self.reaches(Stage::Returned, Instant::now() + CLOSE_TIMEOUT).await;
        self.shared.abandon();
        self.reaches(Stage::Ended, end).await;
    }

    async fn reaches(&mut self, stage: Stage, end: Instant) {
        // Bounded for a service that does not answer: what is not returned then, returns when its loan is over.
        let _ = timeout_at(end, async {
            let _ = self.stage.wait_for(|now| *now >= stage).await;
            self.shared.all_told().await;
        })
        .await;
    }
}

impl SqsConsumer {
    pub(crate) fn start(link: Arc<Link>, shared: Arc<Shared>, plan: Plan, url: Url, unwrap: bool) -> Self {
        let (stage, stages) = watch::channel(Stage::Reading);
        let reading = Reading { lease: shared.lease(), unwrap };
        let task = Task { link: Arc::clone(&link), shared: Arc::clone(&shared), plan, url, reading, stage };
        link.spawn(task.run());
        let handle = ConsumerHandle { shared: Arc::clone(&shared), stage: stages };
        Self { settler: Arc::new(SqsSettler(Arc::clone(&shared))), shared, handle }
    }

    pub(crate) fn handle(&self) -> ConsumerHandle {
        self.handle.clone()
    }
}

#[async_trait]
impl Consumer for SqsConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            // Nothing is taken while this waits, so dropping the future loses nothing.
            if let Some(result) = self.shared.take(max, into) {
                return result;
            }
            self.shared.arrived.notified().await;
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.shared.start_close();
        self.handle.reaches(Stage::Returned, Instant::now() + CLOSE_TIMEOUT).await;
        Ok(())
    }
}

impl Drop for SqsConsumer {
    fn drop(&mut self) {
        self.shared.start_close();
    }
}

struct Task {
    link: Arc<Link>,
    shared: Arc<Shared>,
    plan: Plan,
    url: Url,
    reading: Reading,
    stage: watch::Sender<Stage>,
}

/// How many requests of each kind are on their way.
#[derive(Debug, Default)]
struct Running {
    polls: usize,
    told: [usize; 3],
}

type Requests = FuturesUnordered<BoxFuture<'static, Done>>;

impl Task {
    async fn run(mut self) {
        let mut requests = Requests::new();
        let mut running = Running::default();
        // How many polls may be on their way: one, and more for each in a row that came back full.
        let mut width = 1;
        let mut tick = Instant::now() + self.shared.tick();
        let mut link_changes = self.link.changes();
        loop {
            if self.shared.is_closing() {
                self.give_back();
            }
            self.start(&mut requests, &mut running, width);
            // What a poll brings to a queue that is deleted, nobody needs; what one brings that is waited for no longer comes again
            // when its loan is over.
            let polls_end = self.shared.polls_end();
            let is_poll_in_vain = self.plan.own || polls_end.is_some_and(|end| end <= Instant::now());
            let is_idle = if is_poll_in_vain { running.told == [0; 3] } else { requests.is_empty() };
            if self.shared.is_closing() && is_idle {
                if self.shared.is_told() {
                    self.stage.send_if_modified(|stage| std::mem::replace(stage, Stage::Returned) != Stage::Returned);
                }
                if self.shared.is_finished() {
                    break;
                }
            }
            tokio::select! {
                Some(done) = requests.next(), if !requests.is_empty() => match done {
                    Done::Polled { asked, answer } => {
                        running.polls -= 1;
                        width = self.polled(asked, answer, width).await;
                    }
                    Done::Told(what) => {
                        running.told[what as usize] -= 1;
                        self.shared.request_is_over();
                    }
                },
                () = link_changes.changed() => if self.link.is_closed() { break },
                () = sleep_until(tick) => {
                    self.shared.heartbeat(self.link.is_up());
                    tick = Instant::now() + self.shared.tick();
                }
                () = sleep_until(polls_end.unwrap_or(tick)), if polls_end.is_some() && !is_poll_in_vain => {}
                () = self.shared.work.notified() => {}
            }
        }
        self.end().await;
    }

    /// Returns what was fetched and not received.
    fn give_back(&self) {
        for incoming in self.shared.unread() {
            if let Some(held) = self.shared.unhold(incoming.token) {
                settle::release(&self.shared, held, incoming.message);
                self.shared.request_is_over();
            }
        }
    }

    /// Starts every request that may start; none while the service is not there.
    fn start(&self, requests: &mut Requests, running: &mut Running, width: usize) {
        let Some(live) = self.link.live_now() else { return };
        while running.polls < width
            && let Some(asked) = self.shared.reserve()
        {
            running.polls += 1;
            requests.push(Box::pin(polling(self.context(&live), asked, self.reading)));
        }
        let told = &mut running.told;
        while let copies = self.shared.next_copies(told[Told::Copies as usize])
            && !copies.is_empty()
        {
            told[Told::Copies as usize] += 1;
            requests.push(Box::pin(copying(self.context(&live), copies)));
        }
        while let changes = self.shared.next_changes(told[Told::Changes as usize])
            && !changes.is_empty()
        {
            told[Told::Changes as usize] += 1;
            requests.push(Box::pin(changing(self.context(&live), changes)));
        }
        while let deletes = self.shared.next_deletes(told[Told::Deletes as usize])
            && !deletes.is_empty()
        {
            told[Told::Deletes as usize] += 1;
            requests.push(Box::pin(deleting(self.context(&live), deletes)));
        }
    }

    fn context(&self, live: &Live) -> Context {
        Context {
            link: Arc::clone(&self.link),
            live: live.clone(),
            shared: Arc::clone(&self.shared),
            url: Arc::clone(&self.url),
        }
    }

    /// Takes what a poll has brought; the number of polls that may be on their way next.
    async fn polled(&mut self, asked: usize, answer: Result<Vec<(Incoming, Held)>>, width: usize) -> usize {
        let error = match answer {
            Ok(messages) => {
                let count = messages.len();
                self.shared.arrive(asked, messages);
                return match count {
                    BATCH => (width + 1).min(self.link.config.polls),
                    // More may wait: there was no room for them.
                    _ if count == asked => width,
                    _ => (width - 1).max(1),
                };
            }
            Err(error) => error,
        };
        self.shared.arrive(asked, Vec::new());
        match error.kind() {
            ErrorKind::NotFound if self.plan.declare && !self.shared.is_closing() => self.declare_again().await,
            ErrorKind::NotFound => self.shared.fail(&queue_gone(&self.plan.queue.text)),
            kind if final_error(kind) => self.shared.fail(&error),
            _ => {}
        }
        1
    }

    /// The queue was deleted: it is made again.
    async fn declare_again(&mut self) {
        let Some(live) = self.link.live_now() else { return };
        let limit = self.link.config.connect_timeout;
        let declaring = topology::ensure(&live, &self.plan);
        let declared = match &self.plan.topic {
            None => self.link.call(&live, "declare", Effect::Idempotent, limit, declaring).await,
            Some(_) => self.link.call_with_sns(&live, "declare", Effect::Idempotent, limit, declaring).await,
        };
        match declared {
            Ok(url) => self.url = url,
            Err(error) if final_error(error.kind()) => self.shared.fail(&error),
            Err(error) => {
                tracing::warn!(queue = self.plan.queue.text, %error, "the queue cannot be made again, trying later");
                sleep(PAUSE).await;
            }
        }
    }

    async fn end(self) {
        self.shared.seal(&self.link.ended("receive"));
        if let Some(live) = self.link.live_now().filter(|_| self.plan.own) {
            let limit = self.link.config.connect_timeout;
            let _ = timeout(limit, topology::abandon(&live, &self.plan)).await;
        }
        self.stage.send_replace(Stage::Ended);
    }
}

/// Seconds of a loan, as SQS is told.
pub(crate) fn lease(wanted: Duration) -> Duration {
    let seconds = convert::seconds(wanted).clamp(1, 43_200);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(1))
}

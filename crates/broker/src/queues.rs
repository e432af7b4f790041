//! Every queue by its name, what is delayed, and what a message may ask for.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::{BoxFuture, join_all};
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy, SendQueueMessageResult};
use prost::Message as _;
use tokio::sync::{Notify, oneshot};

use crate::{
    limits::Limits,
    names,
    numbers::Numbers,
    queue::{Lent, Queue, fresh, now},
    refusal::Refusal,
    row::Row,
    store::{Change, Store, StoreError, StoredChannel},
};

/// The pattern "queues" in the store.
pub(crate) const QUEUES: u8 = 1;

/// Messages, and bytes of them, that leave their delay in one step; one message may have more.
const DUE: (usize, usize) = (256, 1 << 20);
/// How soon the clock of delays tries again when the store failed.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it looks what time it is: a machine that slept, and a clock that was set, tell nobody.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Queues {
    store: Store,
    limits: Limits,
    numbers: Arc<Numbers>,
    queues: Mutex<HashMap<String, Arc<Queue>>>,
    delays: AtomicU64,
    /// Something was delayed.
    delayed: Arc<Notify>,
}

impl Queues {
    pub(crate) fn open(
        store: Store,
        limits: Limits,
        numbers: Arc<Numbers>,
        stored: Vec<StoredChannel>,
    ) -> Result<Self, StoreError> {
        let (_, last, _) = store.delays()?;
        let queues = stored
            .into_iter()
            .filter(|channel| channel.kind == QUEUES)
            .map(|channel| {
                let row = Row::of(&channel, &numbers);
                (channel.name.clone(), Arc::new(Queue::new(store.clone(), row, limits.answer, channel)))
            })
            .collect();
        let delays = AtomicU64::new(last + 1);
        Ok(Self { store, limits, numbers, queues: Mutex::new(queues), delays, delayed: Arc::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Queue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queue of a name; it is made when there is none, up to the limit of channels.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Queue>, Refusal> {
        let queues = self.lock();
        if queues.len() >= self.limits.channels && !queues.contains_key(name) {
            return Err(Refusal::channels(self.limits.channels));
        }
        drop(queues);
        self.always(name)
    }

    /// The queue of a name for what must go somewhere, such as a dead letter; as long as there are numbers for channels.
    fn always(&self, name: &str) -> Result<Arc<Queue>, Refusal> {
        let mut queues = self.lock();
        if let Some(queue) = queues.get(name) {
            return Ok(Arc::clone(queue));
        }
        let (row, channel) = Row::make(&self.store, self.numbers.next()?, QUEUES, name);
        let queue = Arc::new(Queue::new(self.store.clone(), row, self.limits.answer, channel));
        queues.insert(name.to_owned(), Arc::clone(&queue));
        Ok(queue)
    }

    /// Every queue, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Queue>> {
        let mut all: Vec<_> = self.lock().values().map(Arc::clone).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// Removes a queue with everything in it; `false` when there is none. It has its name until that is on disk, so that
    /// no other one can be stored before.
    pub(crate) async fn remove(self: &Arc<Self>, name: &str) -> Result<bool, StoreError> {
        let Some(queue) = self.lock().get(name).cloned() else { return Ok(false) };
        queue.purge_much().await?;
        let (done, waits) = oneshot::channel();
        let queues = Arc::clone(self);
        queue.row.clone().remove(&self.store, move |result| {
            let mut all = queues.lock();
            if result.is_ok() && all.get(&queue.name).is_some_and(|found| Arc::ptr_eq(found, &queue)) {
                all.remove(&queue.name);
            }
            drop(all);
            if result.is_ok() {
                queue.end();
            }
            let _ = done.send(result);
        });
        waits.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(true)
    }

    /// Checks messages and hands them to the store; those that follow each other into one queue are stored in one step.
    /// Messages enter their queues in the order of these calls, when each is awaited before the next. The future that it
    /// gives answers when they are on disk, a result each in their order.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        messages: Vec<QueueMessage>,
        may: impl Fn(&QueueMessage) -> Result<(), Refusal>,
    ) -> BoxFuture<'static, Vec<SendQueueMessageResult>> {
        let mut results = Vec::with_capacity(messages.len());
        let mut steps: Vec<Step> = Vec::new();
        for mut message in messages {
            if message.message_id.is_empty() {
                message.message_id = message_id();
            }
            let at = results.len();
            results.push(SendQueueMessageResult { message_id: message.message_id.clone(), ..Default::default() });
            match may(&message).and_then(|()| self.accept(&mut message, &mut results[at])) {
                Ok(bytes) => {
                    let due = results[at].delayed_to;
                    match steps.last_mut() {
                        Some(step) if step.due == due && step.messages[0].channel == message.channel => {
                            step.bytes += bytes;
                            step.places.push(at);
                            step.messages.push(message);
                        }
                        _ => steps.push(Step { due, bytes, places: vec![at], messages: vec![message] }),
                    }
                }
                Err(refusal) => refuse(&mut results[at], &refusal),
            }
        }
        let mut stored = Vec::with_capacity(steps.len());
        for mut step in steps {
            let waits = self.hand_over(&mut step, &mut results).await;
            stored.push((step.places, waits));
        }
        Box::pin(async move {
            for (places, waits) in stored {
                let result = match waits {
                    Ok(waits) => waits.await.unwrap_or(Err(StoreError::Closed)).map_err(Refusal::from),
                    Err(refusal) => Err(refusal),
                };
                let sent_at = now();
                for at in places {
                    match &result {
                        Ok(()) => results[at].sent_at = sent_at,
                        Err(refusal) => refuse(&mut results[at], refusal),
                    }
                }
            }
            results
        })
    }

    /// Makes a message one of ours, unless it may not be; tells its bytes.
    fn accept(&self, message: &mut QueueMessage, result: &mut SendQueueMessageResult) -> Result<usize, Refusal> {
        let (asked, bytes) = self.check(message)?;
        // An expiration begins when the delay has ended.
        let expires = if asked.expiration.is_zero() { Duration::ZERO } else { asked.expiration + asked.delay };
        fresh(message, expires);
        let policy = message.policy.get_or_insert_default();
        if policy.max_receive_count == 0 {
            policy.max_receive_count = self.limits.receive_count;
        }
        result.expiration_at = message.attributes.as_ref().map_or(0, |attributes| attributes.expiration_at);
        result.delayed_to = if asked.delay.is_zero() { 0 } else { now().saturating_add(nanoseconds(asked.delay)) };
        Ok(bytes)
    }

    /// Puts a message in the place of a lent one, in one step. What may not be sent leaves the lent one lent; when the store
    /// fails, it is back at its place.
    pub(crate) async fn replace(
        &self,
        held: &mut Option<Lent>,
        mut message: QueueMessage,
        may: impl Fn(&QueueMessage) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        if message.message_id.is_empty() {
            message.message_id = message_id();
        }
        let mut result = SendQueueMessageResult::default();
        let bytes = may(&message).and_then(|()| self.accept(&mut message, &mut result))?;
        let _admitted = self.store.admit(bytes).await?;
        let queue = self.get(&message.channel)?;
        if let (_, Some(refusal)) = queue.check_room(&self.limits, std::slice::from_ref(&message)) {
            return Err(refusal);
        }
        let Some(lent) = held.take() else { return Ok(()) };
        if result.delayed_to == 0 {
            return Ok(lent.move_to(&queue, |held| *held = message).await?);
        }
        let delay = self.delay(&queue, result.delayed_to, &message);
        Ok(lent.delay_to(&queue, delay, Arc::clone(&self.delayed)).await?)
    }

    fn delay(&self, queue: &Queue, due: i64, message: &QueueMessage) -> Change {
        let id = self.delays.fetch_add(1, Ordering::Relaxed);
        Change::Delay { id, channel: queue.id, due, value: message.encode_to_vec() }
    }

    /// Gives a step to the store, as much of it as its queue may have; what comes back tells when it is on disk.
    async fn hand_over(
        &self,
        step: &mut Step,
        results: &mut [SendQueueMessageResult],
    ) -> Result<oneshot::Receiver<Result<(), StoreError>>, Refusal> {
        let admitted = self.store.admit(step.bytes).await?;
        let queue = self.get(&step.messages[0].channel)?;
        if let (fit, Some(refusal)) = queue.check_room(&self.limits, &step.messages) {
            step.places.drain(fit..).for_each(|at| refuse(&mut results[at], &refusal));
            step.messages.truncate(fit);
        }
        let (done, waits) = oneshot::channel();
        let then = |result| drop(done.send(result));
        if step.due == 0 {
            queue.put(std::mem::take(&mut step.messages), Vec::new(), Some(admitted), then);
        } else {
            let delays = step.messages.drain(..).map(|message| self.delay(&queue, step.due, &message));
            let delays: Vec<_> = delays.collect();
            let (delayed, count) = (Arc::clone(&self.delayed), delays.len() as u64);
            let target = Arc::clone(&queue);
            queue.row.commit(&self.store, delays, Some(admitted), move |result| {
                target.delayed(if result.is_ok() { count } else { 0 });
                // Whether the sender still waits or not.
                delayed.notify_one();
                then(result);
            });
        }
        Ok(waits)
    }

    /// In the protocol's order of checks.
    fn check(&self, message: &QueueMessage) -> Result<(Asked, usize), Refusal> {
        if message.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check_queue(&message.channel)?;
        if message.metadata.is_empty() && message.body.is_empty() {
            return Err(Refusal::empty_message());
        }
        self.limits.check_size(&message.metadata, &message.body, &message.tags)?;
        let none = QueueMessagePolicy::default();
        let policy = message.policy.as_ref().unwrap_or(&none);
        let expiration = within(policy.expiration_seconds, self.limits.expiration).ok_or_else(Refusal::expiration)?;
        if !(0..=self.limits.receive_count).contains(&policy.max_receive_count) {
            return Err(Refusal::receive_count());
        }
        let delay = within(policy.delay_seconds, self.limits.delay).ok_or_else(Refusal::delay)?;
        if !policy.max_receive_queue.is_empty() {
            names::check_queue(&policy.max_receive_queue)?;
        }
        Ok((Asked { expiration, delay }, message.encoded_len()))
    }

    /// A delivery failed: to the tail again, counted, or to the dead letters when that was the last one allowed.
    pub(crate) async fn reject(&self, lent: Lent) -> Result<(), Refusal> {
        let (count, policy) = lent.policy();
        let most = if policy.max_receive_count > 0 { policy.max_receive_count } else { self.limits.receive_count };
        if count < most {
            let queue = Arc::clone(lent.queue());
            return Ok(lent.move_to(&queue, |_| {}).await?);
        }
        if policy.max_receive_queue.is_empty() {
            tracing::warn!(
                queue = lent.queue().name,
                count,
                "a message has failed for good and is dropped: it has no dead-letter queue"
            );
            return Ok(lent.remove().await?);
        }
        let target = self.always(&policy.max_receive_queue)?;
        let source = lent.queue().name.clone();
        Ok(lent.move_to(&target, |message| reroute(message, source)).await?)
    }

    /// To another queue, as new.
    pub(crate) async fn requeue(&self, lent: Lent, target: &str, rerouted: bool) -> Result<(), Refusal> {
        let target = self.get(target)?;
        let source = lent.queue().name.clone();
        let expiration = lent.policy().1.expiration_seconds;
        lent.move_to(&target, |message| {
            fresh(message, Duration::from_secs(expiration.max(0).unsigned_abs().into()));
            if rerouted && let Some(attributes) = &mut message.attributes {
                attributes.re_routed = true;
                attributes.re_routed_from_queue = source;
            }
        })
        .await?;
        Ok(())
    }

    /// Moves what is due into its queues, until the broker stops.
    pub(crate) async fn keep_time(self: Arc<Self>) {
        loop {
            let wait = match self.release().await {
                Ok(wait) => wait,
                Err(StoreError::Closed) => return,
                Err(cause) => {
                    tracing::error!(%cause, "delayed messages cannot be moved; trying again");
                    Some(AGAIN)
                }
            };
            match wait {
                Some(wait) => drop(tokio::time::timeout(wait.min(LOOK), self.delayed.notified()).await),
                None => self.delayed.notified().await,
            }
        }
    }

    /// Removes what has expired although nobody takes it, until the broker stops.
    pub(crate) async fn sweep(self: Arc<Self>) {
        while self.store.failed().is_none() {
            tokio::time::sleep(LOOK).await;
            let queues: Vec<_> = self.lock().values().map(Arc::clone).collect();
            for queue in queues {
                match queue.sweep().await {
                    Ok(()) => {}
                    Err(StoreError::Closed) => return,
                    Err(cause) => {
                        tracing::error!(queue = queue.name, %cause, "expired messages cannot be removed; trying again");
                    }
                }
            }
        }
    }

    /// Moves what is due; tells how long until the next is.
    async fn release(&self) -> Result<Option<Duration>, StoreError> {
        loop {
            let due = self.store.due(now(), DUE.0, DUE.1)?;
            if due.is_empty() {
                let (next, ..) = self.store.delays()?;
                return Ok(next.map(|next| Duration::from_nanos((next - now()).max(0).unsigned_abs())));
            }
            let by_id: HashMap<u32, Arc<Queue>> =
                self.lock().values().map(|queue| (queue.id, Arc::clone(queue))).collect();
            let mut entering = Vec::with_capacity(due.len());
            for delay in due {
                let undelay = Change::Undelay(delay.id);
                let (done, waits) = oneshot::channel();
                let target = by_id.get(&delay.channel).cloned();
                let then = move |result: Result<(), StoreError>| {
                    if let (Ok(()), Some(queue)) = (&result, target) {
                        queue.undelayed();
                    }
                    let _ = done.send(result);
                };
                let message = delay.value.and_then(|value| QueueMessage::decode(&*value).ok());
                match (by_id.get(&delay.channel), message) {
                    (Some(queue), Some(mut message)) => {
                        let policy = message.policy.get_or_insert_default();
                        policy.delay_seconds = 0;
                        let expiration = policy.expiration_seconds.max(0).unsigned_abs();
                        fresh(&mut message, Duration::from_secs(expiration.into()));
                        queue.put(vec![message], vec![undelay], None, then);
                    }
                    (queue, message) => {
                        let (known, readable) = (queue.is_some(), message.is_some());
                        tracing::error!(
                            id = delay.id,
                            known,
                            readable,
                            "a delayed message cannot enter its queue and is removed"
                        );
                        self.store.commit(vec![undelay], None, then);
                    }
                }
                entering.push(waits);
            }
            // All of them, before anything is looked up again: what is still on its way would be due once more.
            for entered in join_all(entering).await {
                entered.unwrap_or(Err(StoreError::Closed))?;
            }
        }
    }
}

struct Asked {
    expiration: Duration,
    delay: Duration,
}

/// Messages for one queue that are stored together.
struct Step {
    /// When their delay ends, in nanoseconds since the Unix epoch; 0 without one.
    due: i64,
    bytes: usize,
    /// Where their results go.
    places: Vec<usize>,
    messages: Vec<QueueMessage>,
}

fn refuse(result: &mut SendQueueMessageResult, refusal: &Refusal) {
    *result = SendQueueMessageResult {
        message_id: std::mem::take(&mut result.message_id),
        is_error: true,
        error: refusal.to_string(),
        ..SendQueueMessageResult::default()
    };
}

/// An id for a message that has none: nobody's secret, so it may come from a generator without the system's help.
pub(crate) fn message_id() -> String {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid().to_string()
}

/// Seconds of a request, when they are none or at most as many as allowed.
pub(crate) fn within(seconds: i32, most: Duration) -> Option<Duration> {
    let asked = Duration::from_secs(u64::try_from(seconds).ok()?);
    (asked <= most).then_some(asked)
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// What a message is in the queue of dead letters: counted anew, without a policy, and it says where it comes from.
fn reroute(message: &mut QueueMessage, source: String) {
    message.policy = Some(QueueMessagePolicy::default());
    let attributes = message.attributes.get_or_insert_default();
    attributes.receive_count = 0;
    attributes.re_routed = true;
    attributes.re_routed_from_queue = source;
}

//! Tasks that make requests, each one after another. A task of its own for each request would be several kilobytes of
//! memory for each message, which costs as much as a tenth of the request.

use std::{
    collections::VecDeque,
    fmt,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_core::{Completer, MessageId, Receipt, Ticket};
use tokio::{
    sync::Notify,
    time::{Instant, Sleep, sleep},
};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::client::{Link, Outbound};

/// A task ends that had nothing to do from one look at it to the next: so long, and no more than twice as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// One request, and who waits for its answer.
pub(crate) struct Job {
    pub(crate) outbound: Outbound,
    pub(crate) id: MessageId,
    pub(crate) completer: Completer<Receipt>,
    /// Those who wait for the end of all requests see this one.
    pub(crate) places: (Ticket, TaskTrackerToken),
}

/// As many tasks as there were requests at a time lately.
pub(crate) struct Lanes {
    link: Arc<Link>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A request waits for a task that waits.
    come: Notify,
}

#[derive(Default)]
struct State {
    /// No more than there are tasks that wait.
    waiting: VecDeque<Job>,
    /// Tasks that wait, or were told of a request and have not looked yet.
    idle: usize,
    /// All tasks.
    alive: usize,
    /// There will be no more requests.
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request; `None` when there was none between two ends of `patience`. That goes on from one request to the
    /// next: a timer for each wait would be one more for each message.
    async fn next(&self, mut patience: Pin<&mut Sleep>) -> Option<Job> {
        let (mut is_fresh, mut is_late) = (true, false);
        loop {
            let mut come = pin!(self.come.notified());
            let idle = {
                let mut state = self.lock();
                if let Some(job) = state.waiting.pop_front() {
                    return Some(job);
                }
                if state.closed || is_late {
                    return None;
                }
                // Told of all that comes from here on.
                come.as_mut().enable();
                state.idle += 1;
                Idle(self)
            };
            tokio::select! {
                biased;
                () = come => {}
                () = patience.as_mut() => {
                    patience.as_mut().reset(Instant::now() + PATIENCE);
                    is_late = !std::mem::take(&mut is_fresh);
                }
            }
            drop(idle);
        }
    }
}

/// A task that waits. When a runtime ends, it drops its tasks wherever they are.
struct Idle<'a>(&'a Shared);

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.lock().idle -= 1;
    }
}

/// A task that has not ended.
struct Alive(Arc<Shared>);

impl Alive {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.lock().alive += 1;
        Self(Arc::clone(shared))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.alive -= 1;
        if state.alive == 0 {
            // Nobody is left for what waits: dropped, it is answered.
            let left = std::mem::take(&mut state.waiting);
            drop(state);
            drop(left);
        }
    }
}

impl Lanes {
    pub(crate) fn new(link: &Arc<Link>) -> Self {
        Self { link: Arc::clone(link), shared: Arc::default() }
    }

    /// Makes the request now, whatever becomes of the caller.
    pub(crate) fn make(&self, job: Job) {
        let mut state = self.shared.lock();
        if state.waiting.len() < state.idle {
            state.waiting.push_back(job);
            drop(state);
            // The latest one: its memory is still at hand, and the others may end.
            return self.shared.come.notify_last();
        }
        drop(state);
        let (link, alive) = (Arc::clone(&self.link), Alive::new(&self.shared));
        self.link.runtime.spawn(async move {
            let mut patience = pin!(sleep(PATIENCE));
            let mut next = Some(job);
            while let Some(job) = next {
                job.run(&link).await;
                next = alive.0.next(patience.as_mut()).await;
            }
        });
    }

    /// There will be no more requests: its tasks end when they have made those that are known.
    pub(crate) fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.come.notify_waiters();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.close();
    }
}

impl Job {
    async fn run(self, link: &Arc<Link>) {
        let Self { outbound, id, completer, places } = self;
        if completer.hand_over() {
            let answered = link.exchange(outbound).await;
            completer.complete(answered.map(|_| Receipt { id, broker_id: None }));
        }
        drop(places);
    }
}

impl fmt::Debug for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lanes").field("alive", &self.shared.lock().alive).finish_non_exhaustive()
    }
}

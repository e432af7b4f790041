//! What all faults have in common: numbered messages on their way while something breaks, and the same checks
//! afterwards.

use std::{ops::AsyncFnOnce, sync::Arc, time::Duration};

use polymq_core::{Bus, Channel, Error, HealthState, Message, Retry, Running};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::Instant,
};

pub(super) use super::plan::Plan;
use super::{
    accepted::Accepted,
    member::{Handling, Member, consume},
    plan::connect,
    states::{States, is_up},
};
use crate::{
    Cx, Figures, Ledger, PATIENCE, Proxy,
    drive::{Log, Seen, bodies, closes},
    eventually,
};

/// What health must have told in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expect {
    /// It went down and came up again.
    Flips,
    /// It was up all the time.
    Stays,
    /// It is up in the end.
    IsUp,
}

/// Numbered messages on their way through one queue.
#[derive(Debug)]
pub(super) struct Scenario {
    pub(super) cx: Cx,
    pub(super) bus: Bus,
    /// The queue, as the sender has it.
    pub(super) queue: Channel,
    pub(super) states: States,
    /// What handlers have begun, and what they have ended.
    pub(super) started: Log,
    pub(super) handled: Log,
    accepted: Accepted,
    sender: Option<Bus>,
    proxy: Option<Arc<Proxy>>,
    running: Running,
    senders: usize,
    hope: Duration,
    sending: Vec<JoinHandle<()>>,
    sent: usize,
    markers: usize,
    /// Between which answers the broker may have lost what it had accepted, because it writes late and was killed.
    unwritten: Vec<(Instant, Instant)>,
    recovery: Option<Duration>,
}

/// What begins so was sent once, with an error: it may have arrived.
const PERHAPS: &str = "perhaps";

impl Scenario {
    /// Connects and starts a consumer of a queue.
    pub(super) async fn start(cx: &Cx, plan: Plan) -> Self {
        let states = States::default();
        let bus = connect(cx, &plan, &plan.url, Some(&states)).await;
        let sender = match &plan.sender {
            Some(url) => Some(connect(cx, &plan, url, None).await),
            None => None,
        };
        let name = cx.name();
        let handling = Handling { slow: plan.slow, ..Handling::default() };
        let running = consume(cx, &bus, &name, handling.clone()).await;
        Self {
            cx: cx.clone(),
            queue: sender.as_ref().unwrap_or(&bus).queue(name).with_timeout(plan.one_send),
            bus,
            states,
            started: handling.started,
            handled: handling.handled,
            accepted: Accepted::default(),
            sender,
            proxy: plan.proxy,
            running,
            senders: plan.senders,
            hope: plan.hope.unwrap_or(cx.harness().recovery() * 2),
            sending: Vec::new(),
            sent: 0,
            markers: 0,
            unwritten: Vec::new(),
            recovery: None,
        }
    }

    /// Sends so many more in the background; every one is accepted in the end, perhaps twice.
    pub(super) fn send(&mut self, count: usize) {
        let (hope, queue, accepted) = (self.hope, self.queue.clone(), self.accepted.clone());
        let (at_a_time, first) = (self.senders, self.sent);
        self.sent += count;
        self.sending.push(tokio::spawn(async move {
            let mut senders = JoinSet::new();
            for body in bodies(first + count).skip(first) {
                let (queue, accepted) = (queue.clone(), accepted.clone());
                senders.spawn(async move {
                    let began = send_one(hope, &queue, &body).await;
                    accepted.add(body, began);
                });
                if senders.len() >= at_a_time {
                    senders.join_next().await.expect("there are some").expect("a sender");
                }
            }
            while let Some(sender) = senders.join_next().await {
                sender.expect("a sender");
            }
        }));
    }

    /// The same, and all of them are handled.
    pub(super) async fn sends_and_handles(&mut self, count: usize) {
        let before = self.handled.len();
        self.send(count);
        self.all_accepted().await;
        self.handled.reaches(before + count).await;
    }

    /// One send, once, with this time-out; what an error leaves open stays out of the ledger.
    pub(super) async fn perhaps(&self, timeout: Duration) -> Result<(), Error> {
        self.perhaps_large(timeout, "").await
    }

    /// The same with a large body. Through the consumer's connection, which is the one that is broken.
    pub(super) async fn perhaps_large(&self, timeout: Duration, body: &str) -> Result<(), Error> {
        let queue = self.bus.channel(self.queue.address().clone()).with_timeout(timeout);
        let message = Message::new(format!("{PERHAPS} {body}"));
        queue.send_message(message).await.map(drop)
    }

    /// A second consumer of the queue.
    pub(super) async fn member(&self) -> Member {
        let bus = self.cx.bus().await;
        let own = Log::default();
        let (started, handled) = (self.started.clone(), self.handled.clone());
        let gate = Arc::default();
        let handling = Handling { started, handled, own: own.clone(), gate: Arc::clone(&gate), slow: None };
        let running = consume(&self.cx, &bus, self.queue.address().name(), handling).await;
        Member { handled: own, bus, running, gate }
    }

    /// The state of the sender's own connection, if it has one.
    pub(super) fn health_of_sender(&self) -> Option<HealthState> {
        self.sender.as_ref().map(|bus| bus.health().state)
    }

    /// Calls of handlers for what is in the ledger.
    fn counted(&self) -> Vec<Seen> {
        self.handled.all().into_iter().filter(|seen| !seen.body.starts_with(PERHAPS)).collect()
    }

    /// Waits until all that was given to [`send`](Self::send) is accepted.
    pub(super) async fn all_accepted(&mut self) {
        for sending in self.sending.drain(..) {
            sending.await.expect("the sender");
        }
    }

    /// When so many are handled, breaks something, and waits until health has told and it works again. The fault tells
    /// when a killed broker was gone.
    pub(super) async fn breaks(&mut self, at: usize, fault: impl AsyncFnOnce() -> Option<Instant>) {
        self.handled.reaches(at).await;
        let downs = self.states.downs();
        let began = Instant::now();
        let gone = fault().await;
        let ended = Instant::now();
        self.states.goes_down(PATIENCE, downs).await;
        // An answer that was read late is one of the killed broker's until health has told.
        if let (Some(gone), Some(told)) = (gone, self.states.went_down(downs)) {
            let written = self.accepted.last_began(gone).unwrap_or(gone);
            self.unwritten.push((written.min(began - self.cx.harness().write_lag()), told));
        }
        self.works_again(ended).await;
    }

    /// When so many are handled, resets every connection while something is under way, and waits until health has told and it
    /// works again. Where each request has a connection of its own, a reset with nothing under way is no fault.
    pub(super) async fn resets(&mut self, at: usize, proxy: &Proxy) {
        self.handled.reaches(at).await;
        let downs = self.states.downs();
        let mut ended = Instant::now();
        for _ in 0..10 {
            proxy.reset_all();
            ended = Instant::now();
            if self.states.has_told(PATIENCE / 10, downs).await.is_ok() {
                break;
            }
            let handled = self.handled.len();
            self.send(200);
            self.handled.reaches(handled + 20).await;
        }
        self.states.goes_down(Duration::ZERO, downs).await;
        self.works_again(ended).await;
    }

    /// A message that is sent now is accepted and handled; how long that took since the fault ended is recorded. (Sent
    /// now, so that what was fetched before does not count.)
    pub(super) async fn works_again(&mut self, ended: Instant) {
        let marker = marker(self.markers);
        self.markers += 1;
        let began = send_one(self.hope, &self.queue, &marker).await;
        self.accepted.add(marker.as_str(), began);
        eventually(self.cx.harness().recovery(), || async {
            if !self.handled.of(&marker).is_empty() {
                return Ok(());
            }
            let last = self.handled.all().last().map(|seen| (seen.body.clone(), seen.at.elapsed()));
            Err(format!(
                "{marker}, a message that was accepted is not handled; {} accepted, {} handled, the last {last:?} ago; {}",
                self.accepted.len(),
                self.handled.len(),
                self.bus.health()
            ))
        })
        .await;
        let took = ended.elapsed();
        self.recovery = Some(self.recovery.map_or(took, |longest| longest.max(took)));
    }

    fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::sent(bodies(self.sent).chain((0..self.markers).map(marker)));
        self.counted().into_iter().for_each(|seen| ledger.see(seen.body));
        ledger
    }

    /// What the broker had accepted and not written when it was killed is lost by it, if it says that it writes late.
    fn may_be_lost(&self, body: &str) -> bool {
        let lag = !self.cx.harness().write_lag().is_zero();
        let within = |at: Instant| self.unwritten.iter().any(|(from, to)| (*from..=*to).contains(&at));
        lag && self.accepted.at(body).is_some_and(within)
    }

    /// The checks after every fault: everything is accepted and handled, each under the id it was sent with; health has
    /// told the truth; stopping is bounded; no connection and no task is left.
    pub(super) async fn ends(mut self, expect: Expect) {
        self.all_accepted().await;
        let recovery = self.cx.harness().recovery();
        eventually(recovery, || async {
            let ledger = self.ledger();
            let missing: Vec<_> = ledger.missing().into_iter().filter(|body| !self.may_be_lost(body)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let example = self.accepted.at(missing[0]).map(|at| at.elapsed());
            Err(format!(
                "{} of {} are missing, {} accepted {example:?} ago; {}",
                missing.len(),
                self.sent,
                missing[0],
                self.bus.health()
            ))
        })
        .await;
        for seen in self.counted() {
            let id = seen.id.as_ref().map(ToString::to_string);
            assert_eq!(id.as_ref(), Some(&seen.body), "a message has the id that its sender gave it");
        }
        match expect {
            Expect::Flips => self.states.recovered(&self.cx, &self.bus).await,
            Expect::Stays => {
                assert_eq!(self.states.downs(), 0, "health told of a fault that was none: {}", self.states)
            }
            Expect::IsUp => {}
        }
        eventually(recovery, || async { is_up(&self.bus) }).await;
        assert_eq!(self.states.all().first(), Some(&HealthState::Up), "callbacks come in order");
        eventually(PATIENCE, || async {
            match self.queue.in_flight() {
                0 => Ok(()),
                count => Err(format!("{count} places of the sender's window are taken")),
            }
        })
        .await;
        self.stops().await;
        self.record();
        let proxy = self.proxy.clone();
        self.closes().await;
        if let Some(proxy) = proxy {
            leaves_no_connection(&proxy).await;
        }
        leaves_no_task().await;
    }

    fn record(&self) {
        let ledger = self.ledger();
        self.cx.record(Figures {
            accepted: self.accepted.len(),
            handled: self.counted().len(),
            lost: ledger.missing().len(),
            duplicated: ledger.surplus().iter().map(|(_, extra)| extra).sum(),
            recovery: self.recovery,
            health: self.states.to_string(),
        });
        for lost in ledger.missing() {
            let at = self.accepted.at(lost);
            let before =
                self.unwritten.iter().filter_map(|(_, told)| at.map(|at| told.saturating_duration_since(at))).min();
            self.cx.note(format_args!(
                "{lost} is lost: the broker answered it {before:?} before it was known to be gone, and writes later"
            ));
        }
    }

    /// Stops the consumer, which must not take for ever whatever has happened before.
    async fn stops(&self) {
        let stopped = tokio::time::timeout(ENDING, self.running.stop()).await;
        stopped.expect("stopping is bounded").expect("stop");
    }

    /// The same and closes, without the checks of [`ends`](Self::ends).
    pub(super) async fn closes(&self) {
        self.stops().await;
        for bus in std::iter::once(&self.bus).chain(&self.sender) {
            tokio::time::timeout(ENDING, closes(bus)).await.expect("closing is bounded");
        }
    }
}

/// How long stopping and closing may take.
const ENDING: Duration = Duration::from_secs(45);

/// Whatever was started is over, but for the case and its proxy.
pub(super) async fn leaves_no_task() {
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    eventually(PATIENCE, || async { if tasks() <= 4 { Ok(()) } else { Err(format!("{} tasks are left", tasks())) } })
        .await;
}

/// Whatever was connected through this proxy is not any more. To be asked when all is closed and nothing dropped yet.
pub(super) async fn leaves_no_connection(proxy: &Proxy) {
    eventually(PATIENCE, || async {
        match proxy.stats().open {
            0 => Ok(()),
            open => Err(format!("{open} connections are left open")),
        }
    })
    .await;
}

fn marker(number: usize) -> String {
    format!("after fault {number}")
}

/// Sends until it is accepted, as long as the errors allow it; gives when the send began that was accepted.
pub(super) async fn send_one(hope: Duration, queue: &Channel, body: &str) -> Instant {
    let message = Message::new(body.to_owned()).with_id(body);
    let deadline = Instant::now() + hope;
    loop {
        let began = Instant::now();
        let Err(error) = queue.send_message(message.clone()).await else { return began };
        assert!(error.retry() != Retry::Never, "an error without hope during a fault: {error:?}");
        assert!(Instant::now() < deadline, "not sent in the end: {error:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

//! One supervised MQTT connection, seen from its owner; [`supervisor`](crate::supervisor) runs it.
//!
//! rumqttc's packets and codecs, but not its event loop: see "Why not the event loop" in the README. A link
//! writes everything that waits with one system call, never sends a message a second time by itself, ends a
//! connection whose writes hang, and lends packet ids until they are answered.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use polymq_core::{Error, ErrorKind, Result, Retry};
use rumqttc::v5::mqttbytes::v5::{Filter, PubAckReason, Publish};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use crate::{
    backlog::Backlog, config::MqttConfig, error::error, health::Member, limits::Limits, slots::Answer, supervisor,
};

/// What tells a link's connections from others.
#[derive(Debug, Clone)]
pub(crate) struct LinkOptions {
    pub(crate) client_id: String,
    /// Forget the session at each connect. Never for sessions that must survive a restart of the broker.
    pub(crate) clean_start: bool,
    /// How long the broker keeps the session without a connection; zero ends it with the connection.
    pub(crate) session_expiry: Duration,
    pub(crate) receive_maximum: u16,
    pub(crate) will: Option<(String, Bytes)>,
    /// After a reconnect, and where the first connection is waited for, messages wait until [`Link::open_gate`], so that
    /// topology can be made first.
    pub(crate) gated: bool,
    /// Whether a first attempt that fails ends the link.
    pub(crate) first_must_succeed: bool,
    /// Generations count from the one after this.
    pub(crate) after: u32,
}

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum Lost {
    /// Another connection uses this client id.
    TakenOver,
    /// Anything else, as a sentence.
    Because(String),
}

/// What a link tells its owner, from its own task: must not block.
pub(crate) trait Events: Send + Sync + 'static {
    /// Connected; what follows is of this generation. Subscriptions are made again by the link.
    fn connected(&mut self, generation: u32, session_present: bool);
    /// A message arrived.
    fn message(&mut self, generation: u32, publish: Publish);
    /// No more messages are at hand for now.
    fn idle(&mut self) {}
    /// Whether more messages may come; until then, nothing is read.
    fn has_room(&self) -> bool {
        true
    }
    /// More messages may come.
    fn room(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
    /// Whether to read what is there all the same: a connection that ended is not noticed otherwise.
    fn must_look(&self) -> bool {
        false
    }
    /// Everything that was there has been read.
    fn looked(&mut self) {}
    /// The connection ended; `false` ends the link too.
    fn lost(&mut self, lost: &Lost) -> bool;
    /// Another connection has reached the broker again: no need to wait longer.
    fn broker_is_back(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
    /// The pause before a reconnect is over; `false` ends the link instead.
    fn may_reconnect(&mut self) -> bool {
        true
    }
    /// A subscription is in force.
    fn subscribed(&mut self) {}
    /// A subscription was refused when it was made again.
    fn refused(&mut self, error: Error) {
        let _ = error;
    }
    /// The link ended and does nothing any more.
    fn ended(&mut self, error: Option<&Error>) {
        let _ = error;
    }
}

/// A message to send, and who waits for its answer.
pub(crate) struct Outgoing {
    pub(crate) publish: Publish,
    pub(crate) answer: Answer,
}

#[allow(clippy::large_enum_variant)] // nearly all are messages, and a box for each would cost more
pub(crate) enum Sending {
    Message(Outgoing),
    Flush(oneshot::Sender<()>),
}

pub(crate) enum Command {
    /// Jumps the queue of messages and the gate, and waits for room in the window only; for the few messages of the protocol between consumers.
    Message(Box<Outgoing>),
    Ack {
        generation: u32,
        pkid: u16,
    },
    Subscribe(Filter, oneshot::Sender<Result<()>>),
    Unsubscribe(String, oneshot::Sender<Result<()>>),
    Ping(oneshot::Sender<Result<()>>),
    OpenGate(u32),
    /// Everything that was commanded before is written.
    Flush(oneshot::Sender<()>),
    Close {
        end_session: bool,
        done: oneshot::Sender<usize>,
    },
}

/// The owner's end of a link. Dropping every clone closes the connection and keeps the session.
#[derive(Clone)]
pub(crate) struct Link {
    sends: mpsc::UnboundedSender<Sending>,
    commands: mpsc::UnboundedSender<Command>,
    limits: Arc<Limits>,
    /// Messages that the task has not taken yet.
    waiting: Arc<AtomicUsize>,
    given_up: Arc<OnceLock<String>>,
}

/// The task's end of a link.
pub(crate) struct Ends {
    pub(crate) sends: Backlog,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) limits: Arc<Limits>,
    /// Why there will be no connection any more, where the program has not closed it.
    pub(crate) given_up: Arc<OnceLock<String>>,
}

impl Link {
    /// Starts a link; the receiver answers the first attempt to connect.
    pub(crate) fn start(
        runtime: &Handle,
        config: Arc<MqttConfig>,
        options: LinkOptions,
        health: Member,
        events: impl Events,
    ) -> (Self, oneshot::Receiver<Result<()>>) {
        let (sends, sends_rx) = mpsc::unbounded_channel();
        let (commands, commands_rx) = mpsc::unbounded_channel();
        let (first, answer) = oneshot::channel();
        let limits = Arc::<Limits>::default();
        let waiting = Arc::<AtomicUsize>::default();
        let given_up = Arc::<OnceLock<String>>::default();
        let link = Self {
            sends,
            commands,
            limits: Arc::clone(&limits),
            waiting: Arc::clone(&waiting),
            given_up: Arc::clone(&given_up),
        };
        let ends = Ends { sends: Backlog::new(sends_rx, waiting), commands: commands_rx, limits, given_up };
        runtime.spawn(supervisor::run(config, options, health, events, ends, first));
        (link, answer)
    }

    /// Sends in the order of calls, when there is a connection and room in the window.
    pub(crate) fn send(&self, message: Outgoing) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if let Err(mpsc::error::SendError(Sending::Message(message))) = self.sends.send(Sending::Message(message)) {
            message.answer.fail(self.why_ended());
        }
    }

    /// Sends before all others, over this connection or not at all, and tells the broker's answer.
    pub(crate) async fn send_urgent(&self, publish: Publish) -> Result<PubAckReason> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Message(Box::new(Outgoing { publish, answer: Answer::Reason(answer) })));
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The same; nobody waits.
    pub(crate) fn send_and_forget(&self, publish: Publish) {
        self.command(Command::Message(Box::new(Outgoing { publish, answer: Answer::Nobody })));
    }

    /// Waits until every message sent before is answered or withdrawn.
    pub(crate) async fn flush_sends(&self) -> Result<()> {
        let (done, waits) = oneshot::channel();
        let _ = self.sends.send(Sending::Flush(done));
        waits.await.map_err(|_| gone())
    }

    /// Waits until everything commanded before is written.
    pub(crate) async fn flush_commands(&self) {
        let (done, waits) = oneshot::channel();
        self.command(Command::Flush(done));
        let _ = waits.await;
    }

    /// Acknowledges a message of a generation; without effect when that connection has ended.
    pub(crate) fn ack(&self, generation: u32, pkid: u16) {
        self.command(Command::Ack { generation, pkid });
    }

    pub(crate) async fn subscribe(&self, filter: Filter) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Subscribe(filter, answer));
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    pub(crate) async fn unsubscribe(&self, filter: String) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Unsubscribe(filter, answer));
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Unsubscribes; nobody waits.
    pub(crate) fn unsubscribe_and_forget(&self, filter: String) {
        let (answer, _) = oneshot::channel();
        self.command(Command::Unsubscribe(filter, answer));
    }

    pub(crate) async fn ping(&self) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Ping(answer));
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    pub(crate) fn open_gate(&self, generation: u32) {
        self.command(Command::OpenGate(generation));
    }

    /// Messages that wait for a connection or for room in the window.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Disconnects and tells how many messages were never sent; with `end_session` the broker forgets the session and
    /// what it holds. A second call does nothing.
    pub(crate) async fn close(&self, end_session: bool) -> usize {
        let (done, waits) = oneshot::channel();
        self.command(Command::Close { end_session, done });
        waits.await.unwrap_or(0)
    }

    /// The largest packet that the broker takes.
    pub(crate) fn max_packet(&self) -> usize {
        self.limits.packet()
    }

    /// Why there will be no connection any more, where the program has not closed it.
    pub(crate) fn given_up(&self) -> Option<&str> {
        self.given_up.get().map(String::as_str)
    }

    /// Waits until there will be no connection any more.
    pub(crate) async fn ended(&self) {
        self.commands.closed().await;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.commands.is_closed()
    }

    pub(crate) fn why_ended(&self) -> Error {
        ended(self.given_up.get())
    }

    fn command(&self, command: Command) {
        // A link that has ended drops the command and with it the answer's sender, which tells who waits.
        let _ = self.commands.send(command);
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("ended", &self.has_ended()).finish()
    }
}

#[cold]
fn gone() -> Error {
    error(ErrorKind::Closed, "the connection was closed")
}

/// What a send is told when there will be no connection any more.
pub(crate) fn ended(given_up: Option<&String>) -> Error {
    match given_up {
        Some(reason) => error(ErrorKind::Disconnected, reason.to_owned()).with_retry(Retry::Never),
        None => Error::closed("send").with_backend(crate::NAME),
    }
}

//! One supervised MQTT connection: connects, keeps alive, reconnects, and moves packets.
//!
//! rumqttc's packets and codecs, but not its event loop: see "Why not the event loop" in the README. A link
//! writes everything that waits with one system call, never sends a message a second time by itself, ends a
//! connection whose writes hang, and lends packet ids until they are answered.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, Sink, SinkExt, StreamExt};
use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{
        ConnAck, Connect, ConnectProperties, ConnectReturnCode, Disconnect, DisconnectProperties, DisconnectReasonCode,
        Filter, LastWill, Login, PingReq, PubAck, PubAckReason, PubRec, PubRecReason, PubRel, Publish, Subscribe,
        Unsubscribe,
    },
};
use tokio::{
    io::{ReadHalf, WriteHalf},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_util::codec::{FramedRead, FramedWrite};

use crate::{
    config::{MqttConfig, Protocol},
    error::{disconnect_reason, error, refused_connect, refused_subscribe},
    health::Member,
    slots::{Answer, Slot, Slots},
    wire::{Codec, Packet, Socket},
};

/// Bytes that wait in memory for the socket before no more messages are taken. Large enough that a full window of
/// small messages is one system call, small enough that a stalled broker does not fill the memory.
const WRITE_BUFFER: usize = 256 * 1024;

/// How long the broker may take to close a connection that we have ended. Too short, and what it has not read yet is
/// delivered again.
const FAREWELL: Duration = Duration::from_secs(3);

/// Packets that are handled before the other side of the socket gets its turn.
const BATCH: usize = 128;

type Reader = FramedRead<ReadHalf<Socket>, Codec>;
type Writer = FramedWrite<WriteHalf<Socket>, Codec>;

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
    /// After a reconnect, messages wait until [`Link::open_gate`], so that topology can be made first.
    pub(crate) gated: bool,
    /// Whether a first attempt that fails ends the link.
    pub(crate) first_must_succeed: bool,
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
    /// The connection ended; `false` ends the link too.
    fn lost(&mut self, lost: &Lost) -> bool;
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

enum Sending {
    Message(Outgoing),
    Flush(oneshot::Sender<()>),
}

enum Command {
    /// Jumps the queue of messages and the gate; for the few messages of the protocol between consumers.
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
    Close { end_session: bool, done: oneshot::Sender<usize> },
}

/// The owner's end of a link. Dropping every clone closes the connection and keeps the session.
#[derive(Clone)]
pub(crate) struct Link {
    sends: mpsc::UnboundedSender<Sending>,
    commands: mpsc::UnboundedSender<Command>,
    max_packet: Arc<AtomicU32>,
    /// Messages that the task has not taken yet.
    waiting: Arc<AtomicUsize>,
}

impl Link {
    /// Starts a link; the receiver answers the first attempt to connect.
    pub(crate) fn start(
        config: Arc<MqttConfig>,
        options: LinkOptions,
        health: Member,
        events: impl Events,
    ) -> (Self, oneshot::Receiver<Result<()>>) {
        let (sends, sends_rx) = mpsc::unbounded_channel();
        let (commands, commands_rx) = mpsc::unbounded_channel();
        let (first, answer) = oneshot::channel();
        let max_packet = Arc::new(AtomicU32::new(u32::MAX));
        let waiting = Arc::<AtomicUsize>::default();
        let link = Self { sends, commands, max_packet: Arc::clone(&max_packet), waiting: Arc::clone(&waiting) };
        let task = Task {
            config,
            options,
            health,
            events,
            sends: sends_rx,
            commands: commands_rx,
            slots: Slots::default(),
            subscriptions: Vec::new(),
            generation: 0,
            gate_open: false,
            max_packet,
            waiting,
        };
        tokio::spawn(task.run(first));
        (link, answer)
    }

    /// Sends in the order of calls, when there is a connection and room in the window.
    pub(crate) fn send(&self, message: Outgoing) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if let Err(mpsc::error::SendError(Sending::Message(message))) = self.sends.send(Sending::Message(message)) {
            message.answer.fail(Error::closed("send").with_backend(crate::NAME));
        }
    }

    /// Sends at once or not at all, and tells the broker's answer.
    pub(crate) async fn send_urgent(&self, publish: Publish) -> Result<PubAckReason> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Message(Box::new(Outgoing { publish, answer: Answer::Reason(answer) })));
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Sends at once or not at all; nobody waits.
    pub(crate) fn send_and_forget(&self, publish: Publish) {
        self.command(Command::Message(Box::new(Outgoing { publish, answer: Answer::Nobody })));
    }

    /// Waits until every message sent before is answered.
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
        self.max_packet.load(Ordering::Relaxed) as usize
    }

    fn command(&self, command: Command) {
        // A link that has ended drops the command and with it the answer's sender, which tells who waits.
        let _ = self.commands.send(command);
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("ended", &self.commands.is_closed()).finish()
    }
}

#[cold]
fn gone() -> Error {
    error(ErrorKind::Closed, "the connection was closed")
}

#[cold]
fn not_connected() -> Error {
    error(ErrorKind::Disconnected, "not connected")
}

enum End {
    Lost(Lost),
    Closed { end_session: bool, done: Option<oneshot::Sender<usize>> },
}

struct Task<E> {
    config: Arc<MqttConfig>,
    options: LinkOptions,
    health: Member,
    events: E,
    sends: mpsc::UnboundedReceiver<Sending>,
    commands: mpsc::UnboundedReceiver<Command>,
    slots: Slots,
    subscriptions: Vec<Filter>,
    generation: u32,
    gate_open: bool,
    max_packet: Arc<AtomicU32>,
    waiting: Arc<AtomicUsize>,
}

impl<E: Events> Task<E> {
    async fn run(mut self, first: oneshot::Sender<Result<()>>) {
        let mut first = Some(first);
        let mut failures = 0_u32;
        loop {
            let attempt = timeout(self.config.connect_timeout, establish(&self.config, &self.options, false));
            let attempt = tokio::select! {
                attempt = attempt => attempt.unwrap_or_else(|_| Err(self.too_slow())),
                end = offline(&mut self.commands) => return self.end(end, first, None).await,
            };
            match attempt {
                Ok((reader, writer, connack)) => {
                    failures = 0;
                    if let Some(first) = first.take() {
                        let _ = first.send(Ok(()));
                    }
                    match self.drive(reader, writer, connack).await {
                        End::Lost(lost) => {
                            let reason = match &lost {
                                Lost::TakenOver => "another connection uses this client id".to_owned(),
                                Lost::Because(reason) => reason.clone(),
                            };
                            tracing::debug!(client_id = self.options.client_id, reason, "MQTT connection lost");
                            self.slots.lose(&reason);
                            self.health.down(&reason);
                            if !self.events.lost(&lost) {
                                let end = End::Closed { end_session: false, done: None };
                                return self.end(end, first, None).await;
                            }
                        }
                        closed => return self.end(closed, first, None).await,
                    }
                }
                Err(cause) => {
                    self.health.down(cause.message());
                    failures = failures.saturating_add(1);
                    let limit = self.config.reconnect_limit;
                    let give_up =
                        (limit > 0 && failures >= limit) || (first.is_some() && self.options.first_must_succeed);
                    if give_up {
                        let end = End::Closed { end_session: false, done: None };
                        return self.end(end, first, Some(cause)).await;
                    }
                    tracing::debug!(client_id = self.options.client_id, %cause, "MQTT connection failed");
                }
            }
            let pause = backoff(&self.config, failures);
            tokio::select! {
                () = sleep(pause) => {}
                end = offline(&mut self.commands) => return self.end(end, first, None).await,
            }
            if self.generation > 0 && !self.events.may_reconnect() {
                let end = End::Closed { end_session: false, done: None };
                return self.end(end, first, None).await;
            }
        }
    }

    #[cold]
    fn too_slow(&self) -> Error {
        error(ErrorKind::Disconnected, format!("no connection within {:?}", self.config.connect_timeout))
    }

    async fn end(mut self, end: End, first: Option<oneshot::Sender<Result<()>>>, cause: Option<Error>) {
        let End::Closed { end_session, done } = end else { return };
        self.slots.lose("the connection was closed");
        self.health.closed();
        if end_session && self.config.protocol == Protocol::V311 {
            // MQTT 3.1.1 can only end a session by beginning a clean one.
            let clean = timeout(self.config.connect_timeout, establish(&self.config, &self.options, true)).await;
            if let Ok(Ok((_, mut writer, _))) = clean {
                let _ =
                    writer.send(Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection))).await;
            }
        }
        self.events.ended(cause.as_ref());
        self.sends.close();
        let mut unsent = 0;
        while let Ok(send) = self.sends.try_recv() {
            if let Sending::Message(message) = send {
                unsent += usize::from(message.answer.is_awaited());
                message.answer.fail(match &cause {
                    Some(cause) => error(ErrorKind::Disconnected, format!("given up: {}", cause.message())),
                    None => Error::closed("send").with_backend(crate::NAME),
                });
            }
        }
        if let (Some(first), Some(cause)) = (first, cause) {
            let _ = first.send(Err(cause));
        }
        if let Some(done) = done {
            let _ = done.send(unsent);
        }
    }

    /// Moves packets until the connection ends.
    async fn drive(&mut self, mut reader: Reader, mut writer: Writer, connack: ConnAck) -> End {
        let keep_alive = self.begin(&connack, &mut writer);
        let mut heard = Instant::now();
        let mut quarter = 0_u32;
        let tick = sleep(keep_alive / 4);
        tokio::pin!(tick);
        loop {
            // Everything that was written below goes out with one system call, and nothing here waits for it.
            if !writer.write_buffer().is_empty() || self.slots.unflushed() {
                match writer.flush().now_or_never() {
                    Some(Ok(())) => self.slots.flushed(),
                    Some(Err(cause)) => return End::Lost(Lost::Because(format!("cannot write: {cause}"))),
                    None => {}
                }
            }
            let room = writer.write_buffer().len() < WRITE_BUFFER;
            let may_send = room && self.gate_open && self.slots.has_room();
            tokio::select! {
                biased;
                packet = reader.next() => {
                    heard = Instant::now();
                    let mut next = packet;
                    for handled in 1.. {
                        let packet = match next {
                            Some(Ok(packet)) => packet,
                            Some(Err(cause)) => return End::Lost(Lost::Because(format!("cannot read: {cause}"))),
                            None => return End::Lost(Lost::Because("the broker closed the connection".into())),
                        };
                        if let Some(lost) = self.packet(packet, &mut writer) {
                            return End::Lost(lost);
                        }
                        if handled == BATCH {
                            break;
                        }
                        match reader.next().now_or_never() {
                            Some(more) => next = more,
                            None => break,
                        }
                    }
                    self.events.idle();
                }
                command = self.commands.recv(), if room => {
                    let mut next = command;
                    for handled in 1.. {
                        match next {
                            Some(Command::Close { end_session, done }) => {
                                self.disconnect(reader, writer, end_session).await;
                                return End::Closed { end_session, done: Some(done) };
                            }
                            Some(command) => self.command(command, &mut writer),
                            // Every owner is gone.
                            None => {
                                self.disconnect(reader, writer, false).await;
                                return End::Closed { end_session: false, done: None };
                            }
                        }
                        if handled == BATCH {
                            break;
                        }
                        match self.commands.try_recv() {
                            Ok(more) => next = Some(more),
                            Err(_) => break,
                        }
                    }
                }
                Some(send) = self.sends.recv(), if may_send => {
                    let mut next = send;
                    for handled in 1.. {
                        match next {
                            Sending::Message(message) => {
                                self.waiting.fetch_sub(1, Ordering::Relaxed);
                                self.send(message, &mut writer);
                            }
                            Sending::Flush(done) => self.slots.when_answered(done),
                        }
                        let full = !self.slots.has_room() || writer.write_buffer().len() >= WRITE_BUFFER;
                        if full || handled == BATCH {
                            break;
                        }
                        match self.sends.try_recv() {
                            Ok(more) => next = more,
                            Err(_) => break,
                        }
                    }
                }
                flushed = writer.flush(), if !writer.write_buffer().is_empty() => match flushed {
                    Ok(()) => self.slots.flushed(),
                    Err(cause) => return End::Lost(Lost::Because(format!("cannot write: {cause}"))),
                },
                () = &mut tick => {
                    // Looking four times and giving up after five quarters bounds the discovery at six quarters.
                    if heard.elapsed() >= keep_alive * 5 / 4 {
                        return End::Lost(Lost::Because(format!("the broker was silent for {:?}", heard.elapsed())));
                    }
                    quarter += 1;
                    if quarter % 2 == 0 {
                        write(&mut writer, Packet::PingReq(PingReq));
                    }
                    tick.as_mut().reset(Instant::now() + keep_alive / 4);
                }
            }
        }
    }

    /// Takes over what the broker said, and subscribes again where it has forgotten.
    fn begin(&mut self, connack: &ConnAck, writer: &mut Writer) -> Duration {
        let properties = connack.properties.as_ref();
        let max_packet = properties.and_then(|properties| properties.max_packet_size);
        self.max_packet.store(max_packet.unwrap_or(u32::MAX), Ordering::Relaxed);
        if let Codec::V5(codec) = writer.encoder_mut() {
            codec.max_outgoing_size = max_packet;
        }
        self.slots.begin(properties.and_then(|properties| properties.receive_max).unwrap_or(u16::MAX));
        self.generation += 1;
        self.gate_open = !self.options.gated || self.generation == 1;
        // Mosquitto 2.0 restores the messages of a session after a restart and forgets its shared subscriptions. Others
        // must not be made again, because that delivers retained messages again.
        if !connack.session_present || self.subscriptions.iter().any(|filter| filter.path.starts_with("$share/")) {
            for filter in self.subscriptions.clone() {
                if let Some(pkid) = self.slots.lend(Slot::Subscribe(None)) {
                    write(writer, subscribe(pkid, filter));
                }
            }
        }
        tracing::debug!(client_id = self.options.client_id, connack.session_present, "MQTT connected");
        self.health.up();
        self.events.connected(self.generation, connack.session_present);
        let theirs = properties.and_then(|properties| properties.server_keep_alive);
        theirs.map_or(self.config.keep_alive, |theirs| Duration::from_secs(theirs.max(1).into()))
    }

    fn packet(&mut self, packet: Packet, writer: &mut Writer) -> Option<Lost> {
        match packet {
            Packet::Publish(publish) => self.events.message(self.generation, publish),
            Packet::PubAck(PubAck { pkid, reason, .. }) => self.slots.answer(pkid, reason),
            Packet::PubRec(PubRec { pkid, reason, .. }) => {
                if self.slots.received(pkid, received_reason(reason)) {
                    write(writer, Packet::PubRel(PubRel::new(pkid, None)));
                }
            }
            Packet::PubComp(comp) => self.slots.complete(comp.pkid),
            Packet::SubAck(ack) => {
                let refusal = ack.return_codes.into_iter().find_map(refused_subscribe);
                if refusal.is_none() {
                    self.events.subscribed();
                }
                match (self.slots.take(ack.pkid), refusal) {
                    (Some(Slot::Subscribe(Some(waits))), refusal) => {
                        let _ = waits.send(refusal.map_or(Ok(()), Err));
                    }
                    (Some(Slot::Subscribe(None)), Some(refusal)) => self.events.refused(refusal),
                    _ => {}
                }
            }
            Packet::UnsubAck(ack) => {
                if let Some(Slot::Unsubscribe(waits)) = self.slots.take(ack.pkid) {
                    let _ = waits.send(Ok(()));
                }
            }
            Packet::PingResp(_) => self.slots.pong(),
            Packet::Disconnect(disconnect) => {
                return Some(match disconnect.reason_code {
                    DisconnectReasonCode::SessionTakenOver => Lost::TakenOver,
                    reason => Lost::Because(disconnect_reason(reason)),
                });
            }
            other => return Some(Lost::Because(format!("unexpected packet {other:?}"))),
        }
        None
    }

    fn command(&mut self, command: Command, writer: &mut Writer) {
        match command {
            Command::Message(message) => self.send(*message, writer),
            Command::Ack { generation, pkid } => {
                if generation == self.generation {
                    write(writer, Packet::PubAck(PubAck::new(pkid, None)));
                }
            }
            Command::Subscribe(filter, answer) => {
                self.subscriptions.retain(|known| known.path != filter.path);
                self.subscriptions.push(filter.clone());
                if let Some(pkid) = self.slots.lend(Slot::Subscribe(Some(answer))) {
                    write(writer, subscribe(pkid, filter));
                }
            }
            Command::Unsubscribe(filter, answer) => {
                self.subscriptions.retain(|known| known.path != filter);
                if let Some(pkid) = self.slots.lend(Slot::Unsubscribe(answer)) {
                    let unsubscribe = Unsubscribe { pkid, filters: vec![filter], properties: None };
                    write(writer, Packet::Unsubscribe(unsubscribe));
                }
            }
            Command::Ping(answer) => {
                self.slots.ping(answer);
                write(writer, Packet::PingReq(PingReq));
            }
            Command::OpenGate(generation) => self.gate_open |= generation == self.generation,
            Command::Flush(done) => self.slots.when_flushed(done),
            // Handled by the caller, which owns the writer.
            Command::Close { .. } => {}
        }
    }

    fn send(&mut self, message: Outgoing, writer: &mut Writer) {
        let Outgoing { mut publish, answer } = message;
        if !answer.hand_over() {
            return;
        }
        let size = publish.size();
        if size > self.max_packet.load(Ordering::Relaxed) as usize {
            answer.fail(error(ErrorKind::TooLarge, format!("a packet of {size} bytes is more than the broker takes")));
            return;
        }
        if publish.qos == QoS::AtMostOnce {
            self.slots.unanswered(answer);
        } else {
            match self.slots.lend(Slot::Publish { answer, received: None }) {
                Some(pkid) => publish.pkid = pkid,
                None => return,
            }
        }
        write(writer, Packet::Publish(publish));
    }

    async fn disconnect(&self, mut reader: Reader, mut writer: Writer, end_session: bool) {
        let mut packet = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        // An interval that was zero at CONNECT must stay zero (3.14.2.2.2): then it needs no ending either.
        if end_session && !self.options.session_expiry.is_zero() {
            packet.properties = Some(DisconnectProperties {
                session_expiry_interval: Some(0),
                reason_string: None,
                user_properties: Vec::new(),
                server_reference: None,
            });
        }
        let farewell = async {
            let _ = writer.send(Packet::Disconnect(packet)).await;
            let _ = SinkExt::<Packet>::close(&mut writer).await;
            // Closing a socket that holds unread packets resets the connection, and mosquitto then forgets to read
            // the acknowledgements before the reset.
            while let Some(Ok(_)) = reader.next().await {}
        };
        // A broker that does not read must not keep us from going.
        let _ = timeout(self.config.operation_timeout.min(FAREWELL), farewell).await;
    }
}

/// Answers what cannot be done without a connection, until the link is closed.
async fn offline(commands: &mut mpsc::UnboundedReceiver<Command>) -> End {
    loop {
        match commands.recv().await {
            Some(Command::Close { end_session, done }) => return End::Closed { end_session, done: Some(done) },
            None => return End::Closed { end_session: false, done: None },
            Some(Command::Message(message)) => message.answer.fail(not_connected()),
            Some(Command::Subscribe(_, answer) | Command::Unsubscribe(_, answer) | Command::Ping(answer)) => {
                let _ = answer.send(Err(not_connected()));
            }
            Some(Command::Flush(done)) => {
                let _ = done.send(());
            }
            // Acknowledgements of a connection that has ended, and its gate.
            Some(Command::Ack { .. } | Command::OpenGate(_)) => {}
        }
    }
}

/// Makes a connection and greets the broker; the caller bounds the time.
async fn establish(config: &MqttConfig, options: &LinkOptions, clean: bool) -> Result<(Reader, Writer, ConnAck)> {
    let lost = |what: &str| error(ErrorKind::Disconnected, format!("{what} before the broker answered CONNECT"));
    let (read, write) = tokio::io::split(Socket::connect(config).await?);
    let mut reader = FramedRead::new(read, Codec::new(config.protocol));
    let mut writer = FramedWrite::new(write, Codec::new(config.protocol));
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = Some(seconds(options.session_expiry));
    properties.receive_maximum = Some(options.receive_maximum);
    let connect = Connect {
        keep_alive: u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX),
        client_id: options.client_id.clone(),
        clean_start: clean || options.clean_start,
        properties: Some(properties),
    };
    let will = options.will.as_ref();
    let will = will.map(|(topic, payload)| LastWill::new(topic, payload.clone(), QoS::AtMostOnce, false, None));
    let login = config.endpoint()?.login().map(|(user, pass)| Login::new(user, pass));
    let written = writer.send(Packet::Connect(connect, will, login)).await;
    written.map_err(|cause| lost("the connection was lost").with_source(cause))?;
    match reader.next().await {
        Some(Ok(Packet::ConnAck(connack))) if connack.code == ConnectReturnCode::Success => {
            Ok((reader, writer, connack))
        }
        Some(Ok(Packet::ConnAck(connack))) => Err(refused_connect(connack.code)),
        Some(Ok(_)) => Err(lost("another packet came")),
        Some(Err(cause)) => Err(lost("an unreadable packet came").with_source(cause)),
        None => Err(lost("the connection was closed")),
    }
}

/// Encodes into memory; what cannot be encoded was checked before.
fn write(writer: &mut Writer, packet: Packet) {
    if let Err(cause) = std::pin::Pin::new(writer).start_send(packet) {
        tracing::error!(%cause, "a packet could not be encoded");
    }
}

fn subscribe(pkid: u16, filter: Filter) -> Packet {
    Packet::Subscribe(Subscribe { pkid, filters: vec![filter], properties: None })
}

fn received_reason(reason: PubRecReason) -> PubAckReason {
    match reason {
        PubRecReason::Success => PubAckReason::Success,
        PubRecReason::NoMatchingSubscribers => PubAckReason::NoMatchingSubscribers,
        PubRecReason::UnspecifiedError => PubAckReason::UnspecifiedError,
        PubRecReason::ImplementationSpecificError => PubAckReason::ImplementationSpecificError,
        PubRecReason::NotAuthorized => PubAckReason::NotAuthorized,
        PubRecReason::TopicNameInvalid => PubAckReason::TopicNameInvalid,
        PubRecReason::PacketIdentifierInUse => PubAckReason::PacketIdentifierInUse,
        PubRecReason::QuotaExceeded => PubAckReason::QuotaExceeded,
        PubRecReason::PayloadFormatInvalid => PubAckReason::PayloadFormatInvalid,
    }
}

/// A session expiry on the wire; the largest number means "never".
fn seconds(expiry: Duration) -> u32 {
    u32::try_from(expiry.as_secs()).unwrap_or(u32::MAX)
}

/// Doubles from `reconnect_initial` to `reconnect_max`, with jitter so that many clients do not come back at once.
fn backoff(config: &MqttConfig, failures: u32) -> Duration {
    let grown = config.reconnect_initial.saturating_mul(1 << failures.min(16)).min(config.reconnect_max);
    grown.mul_f64(fastrand::f64() / 2.0 + 0.5)
}

//! Runs one link: connects, keeps alive, reconnects, and moves packets.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{FutureExt, SinkExt, StreamExt};
use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::{
    self, QoS,
    v5::{
        ConnAck, Disconnect, DisconnectReasonCode, Filter, PingReq, PubAck, PubAckReason, PubRec, PubRecReason, PubRel,
        Subscribe, Unsubscribe,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    task::coop::unconstrained,
    time::{Instant, sleep, timeout},
};

use crate::{
    config::{MqttConfig, Protocol},
    error::{disconnect_reason, error, refused_subscribe, unreachable},
    greeting::{Reader, Writer, establish, leave, write},
    health::Member,
    link::{Command, Ends, Events, LinkOptions, Lost, Outgoing, Sending},
    slots::{Slot, Slots},
    wire::{Codec, Packet},
};

/// Bytes that wait in memory for the socket before no more messages are taken. Large enough that a full window of
/// small messages is one system call, small enough that a stalled broker does not fill the memory.
const WRITE_BUFFER: usize = 256 * 1024;

/// Bytes that wait before they are offered to the socket: the broker works on large messages while more are encoded.
const WRITE_SOON: usize = 32 * 1024;

/// Commands that are handled before the socket gets its turn.
const BATCH: usize = 128;

/// Runs a link until it is closed; `first` answers the first attempt to connect.
pub(crate) async fn run(
    config: Arc<MqttConfig>,
    options: LinkOptions,
    health: Member,
    events: impl Events,
    ends: Ends,
    first: oneshot::Sender<Result<()>>,
) {
    let slots = Slots::default();
    let generation = options.after;
    let task =
        Task { config, options, health, events, ends, slots, subscriptions: Vec::new(), generation, gate_open: false };
    task.run(first).await;
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
    ends: Ends,
    slots: Slots,
    subscriptions: Vec<Filter>,
    generation: u32,
    gate_open: bool,
}

impl<E: Events> Task<E> {
    async fn run(mut self, first: oneshot::Sender<Result<()>>) {
        let mut first = Some(first);
        let mut failures = 0_u32;
        loop {
            let attempt = timeout(self.config.connect_timeout, establish(&self.config, &self.options, false));
            let attempt = tokio::select! {
                attempt = attempt => attempt.unwrap_or_else(|_| Err(self.too_slow())),
                end = offline(&mut self.ends.commands, &mut self.subscriptions) => return self.end(end, first, None).await,
            };
            match attempt {
                Ok((reader, writer, connack)) => {
                    failures = 0;
                    // Before anybody who waits for the connection goes on and asks.
                    self.health.up();
                    match self.drive(reader, writer, connack, first.take()).await {
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
                () = self.events.broker_is_back() => {}
                end = offline(&mut self.ends.commands, &mut self.subscriptions) => return self.end(end, first, None).await,
            }
            if first.is_none() && !self.events.may_reconnect() {
                let end = End::Closed { end_session: false, done: None };
                return self.end(end, first, None).await;
            }
        }
    }

    #[cold]
    fn too_slow(&self) -> Error {
        match self.config.endpoint() {
            Ok(endpoint) => unreachable(&endpoint, &format_args!("no answer in {:?}", self.config.connect_timeout)),
            Err(cause) => cause,
        }
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
        self.ends.sends.close();
        let mut unsent = 0;
        while let Ok(send) = self.ends.sends.try_recv() {
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
    async fn drive(
        &mut self,
        mut reader: Reader,
        mut writer: Writer,
        connack: ConnAck,
        first: Option<oneshot::Sender<Result<()>>>,
    ) -> End {
        let keep_alive = self.begin(&connack, &mut writer);
        // After the owner knows whether there was a session: whoever waits for the connection asks for that, and ends a
        // session that seems to be new.
        if let Some(first) = first {
            let _ = first.send(Ok(()));
        }
        let mut heard = Instant::now();
        let mut quarter = 0_u32;
        let mut read = false;
        let tick = sleep(keep_alive / 4);
        tokio::pin!(tick);
        loop {
            // Everything that was written below goes out with one system call, and nothing here waits for it. Without
            // anything to write, it tells the broker's system that what was read has arrived.
            if !writer.write_buffer().is_empty() || self.slots.unflushed() || read {
                match writer.flush().now_or_never() {
                    Some(Ok(())) => self.slots.flushed(),
                    Some(Err(cause)) => return End::Lost(Lost::Because(format!("cannot write: {cause}"))),
                    None => {}
                }
                read = false;
            }
            let room = has_room(&writer);
            if self.events.must_look() {
                while let Some(packet) = unconstrained(reader.next()).now_or_never() {
                    if let Some(lost) = self.arrived(packet, &mut writer) {
                        return End::Lost(lost);
                    }
                }
                self.events.looked();
            }
            let may_read = self.events.has_room();
            let may_send = room && self.gate_open && self.slots.has_room();
            tokio::select! {
                biased;
                packet = reader.next(), if may_read => {
                    heard = Instant::now();
                    read = true;
                    let mut next = packet;
                    let chunk = self.slots.chunk();
                    for handled in 1.. {
                        if let Some(lost) = self.arrived(next, &mut writer) {
                            return End::Lost(lost);
                        }
                        if handled == chunk || !self.events.has_room() {
                            break;
                        }
                        match reader.next().now_or_never() {
                            Some(more) => next = more,
                            None => break,
                        }
                    }
                    self.events.idle();
                    // Answers have made room: filling it now saves a turn of the loop for each of them.
                    self.pump(&mut writer);
                }
                () = self.events.room(), if !may_read => {}
                command = self.ends.commands.recv(), if room => {
                    let mut next = command;
                    for handled in 1.. {
                        match next {
                            Some(Command::Close { end_session, done }) => {
                                leave(&self.config, &self.options, reader, writer, end_session).await;
                                return End::Closed { end_session, done: Some(done) };
                            }
                            Some(command) => self.command(command, &mut writer),
                            // Every owner is gone.
                            None => {
                                leave(&self.config, &self.options, reader, writer, false).await;
                                return End::Closed { end_session: false, done: None };
                            }
                        }
                        if handled == BATCH {
                            break;
                        }
                        match self.ends.commands.try_recv() {
                            Ok(more) => next = Some(more),
                            Err(_) => break,
                        }
                    }
                }
                Some(send) = self.ends.sends.recv(), if may_send => {
                    self.sending(send, &mut writer);
                    self.pump(&mut writer);
                }
                flushed = writer.flush(), if !writer.write_buffer().is_empty() => match flushed {
                    Ok(()) => self.slots.flushed(),
                    Err(cause) => return End::Lost(Lost::Because(format!("cannot write: {cause}"))),
                },
                () = &mut tick => {
                    // Who does not read cannot hear. Handlers have enough to do meanwhile, and the link that sends listens.
                    if !may_read {
                        heard = Instant::now();
                    }
                    // Looking four times and giving up after five quarters bounds the discovery at six quarters.
                    if heard.elapsed() >= keep_alive * 5 / 4 {
                        return End::Lost(Lost::Because(format!("the broker was silent for {:?}", heard.elapsed())));
                    }
                    quarter += 1;
                    if quarter.is_multiple_of(2) {
                        write(&mut writer, Packet::PingReq(PingReq));
                    }
                    tick.as_mut().reset(Instant::now() + keep_alive / 4);
                }
            }
        }
    }

    /// What reading has given.
    fn arrived(&mut self, packet: Option<Result<Packet, mqttbytes::Error>>, writer: &mut Writer) -> Option<Lost> {
        match packet {
            Some(Ok(packet)) => self.packet(packet, writer),
            Some(Err(cause)) => Some(Lost::Because(format!("cannot read: {cause}"))),
            None => Some(Lost::Because("the broker closed the connection".into())),
        }
    }

    /// Takes over what the broker said, and subscribes again where it has forgotten.
    fn begin(&mut self, connack: &ConnAck, writer: &mut Writer) -> Duration {
        let properties = connack.properties.as_ref();
        let max_packet = properties.and_then(|properties| properties.max_packet_size);
        self.ends.max_packet.store(max_packet.unwrap_or(u32::MAX), Ordering::Relaxed);
        if let Codec::V5(codec) = writer.encoder_mut() {
            codec.max_outgoing_size = max_packet;
        }
        self.slots.begin(properties.and_then(|properties| properties.receive_max).unwrap_or(u16::MAX));
        self.generation += 1;
        self.gate_open = !self.options.gated || self.generation == self.options.after + 1;
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
                        // Who asked may have gone on, having messages of the session at hand.
                        if let Err(Err(refusal)) = waits.send(refusal.map_or(Ok(()), Err)) {
                            self.events.refused(refusal);
                        }
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

    /// Takes messages that wait, as far as they may be sent.
    fn pump(&mut self, writer: &mut Writer) {
        for _ in 0..self.slots.chunk() {
            if !self.gate_open || !self.slots.has_room() || !has_room(writer) {
                return;
            }
            let Ok(send) = self.ends.sends.try_recv() else { return };
            self.sending(send, writer);
            if writer.write_buffer().len() >= WRITE_SOON {
                return;
            }
        }
    }

    fn sending(&mut self, send: Sending, writer: &mut Writer) {
        match send {
            Sending::Message(message) => {
                self.ends.waiting.fetch_sub(1, Ordering::Relaxed);
                self.send(message, writer);
            }
            Sending::Flush(done) => self.slots.when_answered(done),
        }
    }

    fn send(&mut self, message: Outgoing, writer: &mut Writer) {
        let Outgoing { mut publish, answer } = message;
        if !answer.hand_over() {
            return;
        }
        let size = publish.size();
        if size > self.ends.max_packet.load(Ordering::Relaxed) as usize {
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
}

/// Whether the socket keeps up.
fn has_room(writer: &Writer) -> bool {
    writer.write_buffer().len() < WRITE_BUFFER
}

/// Answers what cannot be done without a connection, until the link is closed.
async fn offline(commands: &mut mpsc::UnboundedReceiver<Command>, subscriptions: &mut Vec<Filter>) -> End {
    loop {
        match commands.recv().await {
            Some(Command::Close { end_session, done }) => return End::Closed { end_session, done: Some(done) },
            None => return End::Closed { end_session: false, done: None },
            Some(Command::Message(message)) => message.answer.fail(not_connected()),
            Some(Command::Subscribe(_, answer) | Command::Ping(answer)) => {
                let _ = answer.send(Err(not_connected()));
            }
            Some(Command::Unsubscribe(filter, answer)) => {
                // The broker may know it still, where the session is not a clean one.
                subscriptions.retain(|known| known.path != filter);
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

/// Doubles from `reconnect_initial` to `reconnect_max`, with jitter so that many clients do not come back at once.
fn backoff(config: &MqttConfig, failures: u32) -> Duration {
    let grown = config.reconnect_initial.saturating_mul(1 << failures.min(16)).min(config.reconnect_max);
    grown.mul_f64(fastrand::f64() / 2.0 + 0.5)
}

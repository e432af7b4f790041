//! Moves the packets of one connection, until it ends.

use std::time::Duration;

use futures_util::{FutureExt, SinkExt, StreamExt};
use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::{
    self, QoS,
    v5::{
        ConnAck, DisconnectReasonCode, Filter, PingReq, PubAck, PubAckReason, PubRec, PubRecReason, PubRel, Subscribe,
        Unsubscribe,
    },
};
use tokio::{
    sync::oneshot,
    task::coop::unconstrained,
    time::{Instant, sleep},
};

use super::{End, Task};
use crate::{
    error::{disconnect_reason, error, refused_subscribe},
    greeting::{Reader, Writer, leave, write},
    link::{Command, Events, Lost, Outgoing, Sending},
    slots::Slot,
    wire::{Codec, Packet},
};

/// Bytes that wait in memory for the socket before no more messages are taken. Large enough that a full window of
/// small messages is one system call, small enough that a stalled broker does not fill the memory.
const WRITE_BUFFER: usize = 256 * 1024;

/// Bytes that wait before they are offered to the socket: the broker works on large messages while more are encoded.
const WRITE_SOON: usize = 32 * 1024;

/// Commands that are handled before the socket gets its turn.
const BATCH: usize = 128;

impl<E: Events> Task<E> {
    /// Moves packets until the connection ends.
    pub(super) async fn drive(
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
            self.hurry(&mut writer);
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
            if self.events.must_look() {
                while let Some(packet) = unconstrained(reader.next()).now_or_never() {
                    if let Some(lost) = self.arrived(packet, &mut writer) {
                        return End::Lost(lost);
                    }
                }
                self.events.looked();
                self.events.idle();
            }
            let may_read = self.events.has_room();
            let may_send = has_room(&writer) && self.gate_open && self.slots.has_room();
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
                // Also while the socket does not keep up: what commands write is small, and closing must not wait.
                command = self.ends.commands.recv() => {
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
                Some(send) = self.ends.sends.next(), if may_send => {
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
        self.ends.limits.begin(connack);
        if let Codec::V5(codec) = writer.encoder_mut() {
            codec.max_outgoing_size = properties.and_then(|properties| properties.max_packet_size);
        }
        self.slots.begin(properties.and_then(|properties| properties.receive_max).unwrap_or(u16::MAX));
        self.generation += 1;
        // Nothing was declared before a first connection that had to succeed.
        let at_first = self.options.first_must_succeed && self.generation == self.options.after + 1;
        self.gate_open = !self.options.gated || at_first;
        // Mosquitto 2.0 restores the messages of a session after a restart and forgets its shared subscriptions. Others
        // must not be made again, because that delivers retained messages again.
        if !connack.session_present || self.subscriptions.iter().any(|filter| filter.path.starts_with("$share/")) {
            for filter in self.subscriptions.clone() {
                if let Some(pkid) = self.slots.lend(Slot::Subscribe { asked: filter.qos, answer: None }) {
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
                let Some(Slot::Subscribe { asked, answer }) = self.slots.take(ack.pkid) else { return None };
                let refusal = ack.return_codes.into_iter().find_map(|reason| refused_subscribe(reason, asked));
                if refusal.is_none() {
                    self.events.subscribed();
                }
                match (answer, refusal) {
                    (Some(waits), refusal) => {
                        // Who asked may have gone on, having messages of the session at hand.
                        if let Err(Err(refusal)) = waits.send(refusal.map_or(Ok(()), Err)) {
                            self.events.refused(refusal);
                        }
                    }
                    (None, Some(refusal)) => self.events.refused(refusal),
                    (None, None) => {}
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
            // It takes no room.
            Command::Message(message) if message.publish.qos == QoS::AtMostOnce => self.send(*message, writer),
            Command::Message(message) => {
                self.urgent.push_back(*message);
                self.hurry(writer);
            }
            Command::Ack { generation, pkid } => {
                if generation == self.generation {
                    write(writer, Packet::PubAck(PubAck::new(pkid, None)));
                }
            }
            Command::Subscribe(filter, answer) => {
                self.subscriptions.retain(|known| known.path != filter.path);
                self.subscriptions.push(filter.clone());
                if let Some(pkid) = self.slots.lend(Slot::Subscribe { asked: filter.qos, answer: Some(answer) }) {
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

    /// Sends what goes before all others, as far as the broker takes it.
    fn hurry(&mut self, writer: &mut Writer) {
        while self.slots.has_room()
            && let Some(message) = self.urgent.pop_front()
        {
            self.send(message, writer);
        }
    }

    /// Takes messages that wait, as far as they may be sent.
    fn pump(&mut self, writer: &mut Writer) {
        self.hurry(writer);
        for _ in 0..self.slots.chunk() {
            if !self.gate_open || !self.slots.has_room() || !has_room(writer) {
                return;
            }
            let Some(send) = self.ends.sends.try_next() else { return };
            self.sending(send, writer);
            if writer.write_buffer().len() >= WRITE_SOON {
                return;
            }
        }
    }

    fn sending(&mut self, send: Sending, writer: &mut Writer) {
        match send {
            Sending::Message(message) => self.send(message, writer),
            Sending::Flush(done) => self.slots.when_answered(done),
        }
    }

    fn send(&mut self, message: Outgoing, writer: &mut Writer) {
        let Outgoing { mut publish, answer } = message;
        if !answer.hand_over() {
            return;
        }
        if let Some(forbidden) = answer.forbidden().or_else(|| self.ends.limits.refuse(&publish)) {
            answer.fail(forbidden);
            return;
        }
        // Without a packet id, none is counted.
        publish.pkid = u16::from(publish.qos != QoS::AtMostOnce);
        let size = publish.size();
        if size > self.ends.limits.packet() {
            answer.fail(too_large(size));
            return;
        }
        if publish.qos == QoS::AtMostOnce {
            match write(writer, Packet::Publish(publish)) {
                true => self.slots.unanswered(answer),
                false => answer.fail(too_large(size)),
            }
            return;
        }
        let Some(pkid) = self.slots.lend(Slot::Publish { answer, received: None }) else { return };
        publish.pkid = pkid;
        if !write(writer, Packet::Publish(publish))
            && let Some(Slot::Publish { answer, .. }) = self.slots.take(pkid)
        {
            answer.fail(too_large(size));
        }
    }
}

#[cold]
fn too_large(size: usize) -> Error {
    error(ErrorKind::TooLarge, format!("a packet of {size} bytes is more than the broker takes"))
}

/// Whether the socket keeps up.
fn has_room(writer: &Writer) -> bool {
    writer.write_buffer().len() < WRITE_BUFFER
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

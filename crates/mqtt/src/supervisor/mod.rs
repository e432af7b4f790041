//! Runs one link: connects, keeps alive, reconnects, and moves packets.

mod packets;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::SinkExt;
use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::v5::{Disconnect, DisconnectReasonCode, Filter};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

use crate::{
    config::{MqttConfig, Protocol},
    error::{error, unreachable},
    greeting::establish,
    health::Member,
    link::{Command, Ends, Events, LinkOptions, Lost, Outgoing, Sending, ended},
    slots::Slots,
    wire::Packet,
};

/// A connection that lived for so long was a good one. Shorter ones in a row are made with growing pauses: what ends them (two
/// programs with one client id, a message that the broker refuses) is still there.
const LIVED: Duration = Duration::from_secs(20);

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
    let task = Task {
        config,
        options,
        health,
        events,
        ends,
        slots,
        urgent: VecDeque::new(),
        subscriptions: Vec::new(),
        generation,
        gate_open: false,
    };
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
    /// Messages that go before all others, and wait for room in the window.
    urgent: VecDeque<Outgoing>,
    subscriptions: Vec<Filter>,
    generation: u32,
    gate_open: bool,
}

impl<E: Events> Task<E> {
    async fn run(mut self, first: oneshot::Sender<Result<()>>) {
        let mut first = Some(first);
        if !self.options.first_must_succeed {
            // Someone waits for it, and wants to know why.
            self.health.missing("not connected yet");
        }
        let mut failures = 0_u32;
        // Connections in a row that were lost as soon as they were made.
        let mut short_lived = 0_u32;
        loop {
            let attempt = timeout(self.config.connect_timeout, establish(&self.config, &self.options, false));
            let attempt = tokio::select! {
                attempt = attempt => attempt.unwrap_or_else(|_| Err(self.too_slow())),
                end = offline(&mut self.ends, &mut self.subscriptions) => return self.end(end, first, None).await,
            };
            match attempt {
                Ok((reader, writer, connack)) => {
                    let made = Instant::now();
                    // Before anybody who waits for the connection goes on and asks.
                    self.health.up();
                    match self.drive(reader, writer, connack, first.take()).await {
                        End::Lost(lost) => {
                            let mut reason = match &lost {
                                Lost::TakenOver => "another connection uses this client id".to_owned(),
                                Lost::Because(reason) => reason.clone(),
                            };
                            short_lived = if made.elapsed() < LIVED { short_lived.saturating_add(1) } else { 0 };
                            // One loss says nothing; the next ones are attempts that have failed.
                            failures = short_lived.saturating_sub(1);
                            if failures > 0 {
                                reason =
                                    format!("{short_lived} connections in a row were lost within {LIVED:?}: {reason}");
                                tracing::warn!(client_id = self.options.client_id, reason, "MQTT connection lost");
                            } else {
                                tracing::debug!(client_id = self.options.client_id, reason, "MQTT connection lost");
                            }
                            self.slots.lose(&reason);
                            self.urgent.drain(..).for_each(|message| message.answer.fail(not_connected()));
                            self.health.down(&reason);
                            if !self.events.lost(&lost) {
                                let end = End::Closed { end_session: false, done: None };
                                return self.end(end, first, None).await;
                            }
                            if self.is_enough(failures) {
                                let cause = given_up(failures, error(ErrorKind::Disconnected, reason));
                                let end = End::Closed { end_session: false, done: None };
                                return self.end(end, first, Some(cause)).await;
                            }
                        }
                        closed => return self.end(closed, first, None).await,
                    }
                }
                Err(cause) => {
                    self.health.down(cause.message());
                    failures = failures.saturating_add(1);
                    let refused = first.is_some() && self.options.first_must_succeed;
                    if refused || self.is_enough(failures) {
                        let cause = if refused { cause } else { given_up(failures, cause) };
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
                end = offline(&mut self.ends, &mut self.subscriptions) => return self.end(end, first, None).await,
            }
            if first.is_none() && !self.events.may_reconnect() {
                let end = End::Closed { end_session: false, done: None };
                return self.end(end, first, None).await;
            }
        }
    }

    fn is_enough(&self, failures: u32) -> bool {
        let limit = self.config.reconnect_limit;
        limit > 0 && failures >= limit
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
        self.urgent.drain(..).for_each(|message| message.answer.fail(not_connected()));
        self.health.closed();
        if end_session && self.config.protocol == Protocol::V311 {
            // MQTT 3.1.1 can only end a session by beginning a clean one.
            let clean = timeout(self.config.connect_timeout, establish(&self.config, &self.options, true)).await;
            if let Ok(Ok((_, mut writer, _))) = clean {
                let _ =
                    writer.send(Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection))).await;
            }
        }
        if let Some(cause) = &cause {
            let _ = self.ends.given_up.set(cause.message().to_owned());
        }
        self.events.ended(cause.as_ref());
        self.ends.sends.close();
        let mut unsent = 0;
        while let Some(send) = self.ends.sends.try_next() {
            if let Sending::Message(message) = send {
                unsent += usize::from(message.answer.is_awaited());
                message.answer.fail(ended(self.ends.given_up.get()));
            }
        }
        if let (Some(first), Some(cause)) = (first, cause) {
            let _ = first.send(Err(cause));
        }
        if let Some(done) = done {
            let _ = done.send(unsent);
        }
    }
}

/// Answers what cannot be done without a connection, until the link is closed.
async fn offline(ends: &mut Ends, subscriptions: &mut Vec<Filter>) -> End {
    loop {
        let command = tokio::select! {
            command = ends.commands.recv() => command,
            () = ends.sends.hold() => continue,
        };
        match command {
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

#[cold]
fn given_up(failures: u32, cause: Error) -> Error {
    let sentence = format!("given up after {failures} attempts: {}", cause.message());
    error(cause.kind(), sentence).with_source(cause)
}

/// Doubles from `reconnect_initial` to `reconnect_max`, with jitter so that many clients do not come back at once.
pub(crate) fn backoff(config: &MqttConfig, failures: u32) -> Duration {
    let grown = config.reconnect_initial.saturating_mul(1 << failures.min(16)).min(config.reconnect_max);
    grown.mul_f64(fastrand::f64() / 2.0 + 0.5)
}

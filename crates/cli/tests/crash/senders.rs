//! Who sends: one by one, in batches, over streams.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use polymq_kubemq_proto::*;
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    AGAIN, connect,
    ledger::{Ledger, Phase},
    message,
};

/// Messages of one request.
const BATCH: usize = 10;
/// Requests of a stream that wait for their answers.
const AT_ONCE: usize = 6;

pub(crate) fn start(tasks: &mut JoinSet<()>, address: &str, ledger: &Arc<Ledger>) {
    for sender in ["a", "b", "c"] {
        tasks.spawn(one_by_one(address.to_owned(), Arc::clone(ledger), sender));
    }
    tasks.spawn(in_batches(address.to_owned(), Arc::clone(ledger)));
    tasks.spawn(over_a_stream(address.to_owned(), Arc::clone(ledger)));
    tasks.spawn(stores(address.to_owned(), Arc::clone(ledger)));
}

/// Bodies of a sender, none of them twice.
fn bodies(sender: &str) -> impl Iterator<Item = String> {
    let kinds = ["now", "late", "move", "bad", "now", "move"];
    kinds.into_iter().cycle().enumerate().map(move |(number, kind)| format!("{kind}-{sender}-{number}"))
}

fn event(body: &str) -> Event {
    Event {
        event_id: body.to_owned(),
        client_id: "crash".into(),
        channel: "log".into(),
        body: body.to_owned().into(),
        store: true,
        ..Event::default()
    }
}

/// Sends a message and stores an event.
async fn one_by_one(address: String, ledger: Arc<Ledger>, sender: &str) {
    let mut client = connect(&address);
    for body in bodies(sender) {
        if !ledger.is(Phase::Loads) {
            return;
        }
        match client.send_queue_message(message(&body)).await {
            Ok(result) if !result.get_ref().is_error => ledger.accept(body.clone()),
            _ => sleep(AGAIN).await,
        }
        if client.send_event(event(&body)).await.is_ok_and(|result| result.get_ref().sent) {
            ledger.lock().stored.insert(body);
        }
        ledger.pace(Duration::from_millis(2)).await;
    }
}

/// Which of them were accepted.
fn accept(ledger: &Ledger, bodies: Vec<String>, results: &[SendQueueMessageResult]) {
    assert_eq!(bodies.len(), results.len());
    for (body, result) in bodies.into_iter().zip(results) {
        if !result.is_error {
            ledger.accept(body);
        }
    }
}

async fn in_batches(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    let mut all = bodies("batch");
    while ledger.is(Phase::Loads) {
        let bodies: Vec<_> = all.by_ref().take(BATCH).collect();
        let messages = bodies.iter().map(|body| message(body)).collect();
        match client.send_queue_messages_batch(QueueMessagesBatchRequest { batch_id: "b".into(), messages }).await {
            Ok(answer) => accept(&ledger, bodies, &answer.get_ref().results),
            Err(_) => sleep(AGAIN).await,
        }
        ledger.pace(Duration::from_millis(20)).await;
    }
}

/// Requests of several messages, the next ones before the first is answered.
async fn over_a_stream(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    let mut all = bodies("stream");
    let mut number = 0;
    while ledger.is(Phase::Loads) {
        let (requests, stream) = mpsc::channel(AT_ONCE);
        let Ok(answers) = client.queues_upstream(ReceiverStream::new(stream)).await else {
            sleep(AGAIN).await;
            continue;
        };
        let mut answers = answers.into_inner();
        let mut waiting = HashMap::new();
        while ledger.is(Phase::Loads) {
            number += 1;
            let bodies: Vec<_> = all.by_ref().take(BATCH / 2).collect();
            let messages = bodies.iter().map(|body| message(body)).collect();
            let request = QueuesUpstreamRequest { request_id: number.to_string(), messages };
            waiting.insert(request.request_id.clone(), bodies);
            if requests.send(request).await.is_err() {
                break;
            }
            if waiting.len() < AT_ONCE {
                continue;
            }
            let Ok(Some(answer)) = answers.message().await else { break };
            let bodies = waiting.remove(&answer.ref_request_id).unwrap();
            accept(&ledger, bodies, &answer.results);
            ledger.pace(Duration::from_millis(20)).await;
        }
    }
}

/// Stores events over a stream, the next ones before the first is answered.
async fn stores(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    let mut all = bodies("log");
    while ledger.is(Phase::Loads) {
        let (events, stream) = mpsc::channel(AT_ONCE);
        // Its headers may come with its first answer only.
        let mut waiting: VecDeque<_> = all.by_ref().take(AT_ONCE).collect();
        for body in &waiting {
            events.try_send(event(body)).unwrap();
        }
        let Ok(answers) = client.send_events_stream(ReceiverStream::new(stream)).await else {
            sleep(AGAIN).await;
            continue;
        };
        let mut answers = answers.into_inner();
        while ledger.is(Phase::Loads)
            && let Ok(Some(answer)) = answers.message().await
        {
            // They are answered in their order.
            assert_eq!(waiting.pop_front().as_ref(), Some(&answer.event_id));
            if answer.sent {
                ledger.lock().stored.insert(answer.event_id);
            }
            let body = all.next().unwrap();
            waiting.push_back(body.clone());
            if events.send(event(&body)).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

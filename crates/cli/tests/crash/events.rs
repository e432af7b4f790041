//! Who reads stored events: one over all crashes, whose place the broker remembers, and one in the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use polymq_kubemq_proto::{
    Request, Subscribe, kubemq_client::KubemqClient, request::RequestType, subscribe::EventsStoreType,
    subscribe::SubscribeType,
};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use crate::{
    AGAIN, connect,
    ledger::{Ledger, Phase},
    text,
};

/// Events after which the reader looks where the broker would go on.
const OFTEN: u64 = 50;

/// From the first event, or where this reader was.
fn subscribe(reader: &str) -> Subscribe {
    Subscribe {
        subscribe_type_data: SubscribeType::EventsStore.into(),
        client_id: reader.into(),
        channel: "log".into(),
        events_store_type_data: EventsStoreType::StartFromFirst.into(),
        ..Subscribe::default()
    }
}

/// The place that is stored of the reader.
async fn place(client: &mut KubemqClient<Channel>) -> Option<u64> {
    let request = Request {
        request_type_data: RequestType::Query.into(),
        client_id: "crash".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: "list-readers".into(),
        timeout: 10_000,
        tags: [("channel".to_owned(), "log".to_owned())].into(),
        ..Request::default()
    };
    let answer = client.send_request(request).await.ok()?.into_inner();
    let readers: serde_json::Value = serde_json::from_slice(&answer.body).ok()?;
    readers.as_array()?.iter().find(|reader| reader["client"] == "reader")?["next"].as_u64()
}

/// Reads on after each crash. What was stored of its place is not undone by one.
pub(crate) async fn reads(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    let mut stored = 1;
    while ledger.is(Phase::Drains) {
        let Ok(stream) = client.subscribe_to_events(subscribe("reader")).await else {
            sleep(AGAIN).await;
            continue;
        };
        let (mut stream, mut last) = (stream.into_inner(), None);
        while ledger.is(Phase::Drains) {
            let event = match timeout(Duration::from_millis(500), stream.message()).await {
                Ok(Ok(Some(event))) => event,
                Ok(_) => break,
                Err(_) => continue,
            };
            match last {
                Some(last) => assert_eq!(event.sequence, last + 1, "a gap"),
                None => assert!(event.sequence >= stored, "{} after {stored} was stored", event.sequence),
            }
            last = Some(event.sequence);
            *ledger.lock().read.entry(event.sequence).or_default() += 1;
            if event.sequence % OFTEN == 0
                && let Some(place) = place(&mut client).await
            {
                stored = place;
            }
        }
    }
}

/// Every stored event, once all that are wanted have come or none has for a while; in the order of unbroken sequences.
pub(crate) async fn all(address: &str, mut wanted: BTreeSet<String>) -> BTreeMap<u64, String> {
    let mut stream = connect(address).subscribe_to_events(subscribe("last")).await.unwrap().into_inner();
    let mut found = BTreeMap::new();
    loop {
        let longest = Duration::from_secs(if wanted.is_empty() { 1 } else { 60 });
        let Ok(event) = timeout(longest, stream.message()).await else { return found };
        let event = event.unwrap().unwrap();
        assert_eq!(event.sequence, found.len() as u64 + 1, "a gap");
        let body = text(&event.body);
        wanted.remove(&body);
        found.insert(event.sequence, body);
    }
}

//! Any bytes as any request: the first byte chooses the call, the rest are its messages, each after its length.
//!
//! Whatever comes must be answered or refused, and the broker must go on; calls are given up after a moment, which is
//! what a client that goes away does.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use polymq_kubemq_proto::{Empty, kubemq_client::KubemqClient};
use tonic::{
    Code, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};

use crate::with_broker;

/// Every call, and whether it takes a stream.
pub const CALLS: [(&str, bool); 15] = [
    ("SendEvent", false),
    ("SendEventsStream", true),
    ("SubscribeToEvents", false),
    ("SubscribeToRequests", false),
    ("SendRequest", false),
    ("SendResponse", false),
    ("SendQueueMessage", false),
    ("SendQueueMessagesBatch", false),
    ("ReceiveQueueMessages", false),
    ("StreamQueueMessage", true),
    ("AckAllQueueMessages", false),
    ("Ping", false),
    ("QueuesDownstream", true),
    ("QueuesUpstream", true),
    ("QueuesInfo", false),
];

/// How long a call may take before it is given up.
const PATIENCE: Duration = Duration::from_millis(4);

/// Messages as they are on the wire.
#[derive(Debug, Default, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        target.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining())))
    }
}

/// The messages of an input: each is what follows a byte with its length, in eights; the last one is the rest.
fn messages(mut bytes: &[u8]) -> Vec<Bytes> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = bytes.split_first() {
        let (message, rest) = rest.split_at(rest.len().min(usize::from(*length) * 8));
        messages.push(Bytes::copy_from_slice(message));
        bytes = rest;
    }
    messages
}

pub fn run(bytes: &[u8]) {
    let Some((call, rest)) = bytes.split_first() else { return };
    let (name, streams) = CALLS[usize::from(*call) % CALLS.len()];
    let mut messages = messages(rest);
    if !streams {
        messages.resize(1, Bytes::new());
    }
    with_broker(async |channel, _| {
        let mut client = Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let path = PathAndQuery::try_from(format!("/kubemq.kubemq/{name}")).unwrap();
        // Every call as a stream both ways: on the wire it is the same.
        let call = async {
            let requests = tokio_stream::iter(messages);
            let answers = client.streaming(tonic::Request::new(requests), path, Raw).await?;
            let mut answers = answers.into_inner();
            while answers.message().await?.is_some() {}
            Ok::<_, Status>(())
        };
        if let Ok(Err(status)) = tokio::time::timeout(PATIENCE, call).await {
            assert_ne!(status.code(), Code::Unimplemented, "{name}: {status}");
            assert_ne!(status.code(), Code::Unavailable, "{name}: {status}");
        }
        // It goes on.
        KubemqClient::new(channel).ping(Empty {}).await.unwrap();
    });
}

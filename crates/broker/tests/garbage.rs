//! Streams of what is no message: they end, and the broker goes on.

use std::time::Duration;

use polymq_kubemq_proto::Empty;
use tonic::{client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_prost::ProstCodec;

mod common;

/// Where every request of a stream has text, this has a number.
#[derive(Clone, PartialEq, prost::Message)]
struct Wrong {
    #[prost(fixed64, tag = "1")]
    number: u64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_garbage_ends_and_keeps_nobody_busy() {
    let broker = polymq_broker::Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    for call in ["SendEventsStream", "StreamQueueMessage", "QueuesDownstream", "QueuesUpstream"] {
        let mut client = Grpc::new(common::channel(&broker).await);
        client.ready().await.unwrap();
        let path = PathAndQuery::try_from(format!("/kubemq.kubemq/{call}")).unwrap();
        let wrong = tokio_stream::iter([Wrong { number: 1 }, Wrong { number: 2 }]);
        let answers = async {
            let answers = client.streaming(tonic::Request::new(wrong), path, ProstCodec::<Wrong, Empty>::default());
            let mut answers = answers.await?.into_inner();
            while answers.message().await?.is_some() {}
            Ok::<_, tonic::Status>(())
        };
        let ended = tokio::time::timeout(Duration::from_secs(30), answers).await;
        assert!(ended.is_ok(), "{call} does not end");
    }
    common::client(&broker).await.ping(Empty {}).await.unwrap();
    broker.stop().await;
}

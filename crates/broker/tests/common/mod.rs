//! What the tests of limits and safety share: clients and messages.
#![allow(dead_code)] // each test binary uses a part

use std::{result::Result, time::Duration};

use polymq_broker::Broker;
use polymq_kubemq_proto::{kubemq_client::KubemqClient, subscribe::*, *};
use tonic::{
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

pub(crate) type Client = KubemqClient<InterceptedService<Channel, Token>>;

/// Puts a token to every call.
#[derive(Clone)]
pub(crate) struct Token(Option<String>);

impl Interceptor for Token {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", MetadataValue::try_from(token).unwrap());
        }
        Ok(request)
    }
}

pub(crate) async fn channel(broker: &Broker) -> Channel {
    Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect().await.unwrap()
}

pub(crate) async fn client(broker: &Broker) -> Client {
    KubemqClient::with_interceptor(channel(broker).await, Token(None))
}

pub(crate) async fn client_with(broker: &Broker, token: &str) -> Client {
    KubemqClient::with_interceptor(channel(broker).await, Token(Some(token.trim().to_owned())))
}

pub(crate) fn message(queue: &str, body: impl Into<Vec<u8>>) -> QueueMessage {
    QueueMessage {
        client_id: "test".into(),
        channel: queue.into(),
        body: body.into().into(),
        ..QueueMessage::default()
    }
}

pub(crate) fn event(channel: &str, body: impl Into<Vec<u8>>, store: bool) -> Event {
    Event { client_id: "test".into(), channel: channel.into(), body: body.into().into(), store, ..Event::default() }
}

pub(crate) async fn send(client: &mut Client, message: QueueMessage) -> SendQueueMessageResult {
    client.send_queue_message(message).await.unwrap().into_inner()
}

pub(crate) fn receiving(queue: &str, most: i32) -> ReceiveQueueMessagesRequest {
    ReceiveQueueMessagesRequest {
        client_id: "test".into(),
        channel: queue.into(),
        max_number_of_messages: most,
        wait_time_seconds: 1,
        ..ReceiveQueueMessagesRequest::default()
    }
}

pub(crate) async fn receive(client: &mut Client, queue: &str, most: i32) -> Vec<String> {
    let answer = client.receive_queue_messages(receiving(queue, most)).await.unwrap().into_inner();
    assert!(!answer.is_error, "{}", answer.error);
    answer.messages.iter().map(|message| String::from_utf8(message.body.to_vec()).unwrap()).collect()
}

pub(crate) fn subscribe(kind: SubscribeType, channel: &str, start: EventsStoreType) -> Subscribe {
    Subscribe {
        subscribe_type_data: kind.into(),
        client_id: "test".into(),
        channel: channel.into(),
        events_store_type_data: start.into(),
        ..Subscribe::default()
    }
}

pub(crate) async fn next(stream: &mut tonic::Streaming<EventReceive>) -> EventReceive {
    tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("in time").unwrap().unwrap()
}

/// Connects and pings.
pub(crate) async fn pinged(broker: &Broker) -> Result<(), tonic::Status> {
    let channel = Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect_lazy();
    KubemqClient::new(channel).ping(Empty {}).await.map(drop)
}

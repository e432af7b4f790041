//! Commands and queries: one answer a request, its responder's or the time-out.

use polymq_kubemq_proto::{Request, Response, Subscribe, request::RequestType, subscribe::SubscribeType};

use super::Model;

impl Model {
    pub(super) async fn ask(&mut self, query: bool, answered: bool, cached: u8) {
        let kind = if query { RequestType::Query } else { RequestType::Command };
        let channel = format!("{}.ask", self.name);
        let mut request = Request {
            request_id: "ask".into(),
            request_type_data: kind.into(),
            client_id: "fuzz".into(),
            channel: channel.clone(),
            body: vec![1].into(),
            timeout: if answered { 10_000 } else { 2 },
            ..Request::default()
        };
        if cached > 0 {
            (request.cache_key, request.cache_ttl) = (format!("k{cached}"), 60);
        }
        let mut listening = None;
        if answered {
            let kind = if query { SubscribeType::Queries } else { SubscribeType::Commands };
            let subscribe = Subscribe {
                subscribe_type_data: kind.into(),
                client_id: "responder".into(),
                channel,
                ..Subscribe::default()
            };
            listening = Some(self.client.subscribe_to_requests(subscribe).await.unwrap().into_inner());
        }
        let (mut asking, mut answering) = (self.client.clone(), self.client.clone());
        let respond = async {
            let Some(mut requests) = listening else { return std::future::pending().await };
            while let Some(request) = requests.message().await.unwrap() {
                let response = Response {
                    client_id: "responder".into(),
                    request_id: request.request_id,
                    reply_channel: request.reply_channel,
                    body: vec![2].into(),
                    executed: true,
                    ..Response::default()
                };
                // The second one is nobody's.
                answering.send_response(response.clone()).await.unwrap();
                answering.send_response(response).await.unwrap();
            }
        };
        tokio::select! {
            answer = asking.send_request(request) => match answer {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    assert!(answer.executed && (answered || answer.cache_hit), "{answer:?}");
                    assert_eq!(answer.body.is_empty(), !query, "{answer:?}");
                }
                Err(status) => assert!(!answered && status.message().contains("Error 301"), "{status}"),
            },
            () = respond => panic!("the subscription ended"),
        }
    }
}

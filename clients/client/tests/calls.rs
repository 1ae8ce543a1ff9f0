//! The client against small servers on a Unix socket: errors of every kind, operations followed to
//! their end even when their stream breaks, sessions.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use futures_util::StreamExt;
use pileus_api::{
    Code, ErrorReply, Event, ExecEvent, ExecRequest, LogQuery, Operation, OperationEvent,
    OperationState, Phase,
};
use pileus_base::Error;
use pileus_client::{Client, ExecPart, into_result};

/// Serves `router` on a socket in a folder that lives as long as the test.
async fn serve(router: Router) -> (Client, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (Client::new(socket).unwrap(), dir)
}

fn operation(state: &str) -> Operation {
    serde_json::from_value(serde_json::json!({
        "id": uuid::Uuid::nil(), "kind": "launch", "target": "foo", "state": state,
        "phase": null, "progress": null, "phases": [], "warnings": [], "error": null,
        "created_at": "2026-11-21T20:00:00Z", "ended_at": null,
    }))
    .unwrap()
}

#[tokio::test]
async fn no_daemon_and_no_permission_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let none = Client::new(dir.path().join("none")).unwrap();
    let err = none.instances().await.unwrap_err();
    assert_eq!(err.code, Code::DaemonUnreachable);
    assert!(err.details[0].contains("none' is accessible"), "{err:?}");
    let err = none.exec("foo", ExecRequest::default()).await.unwrap_err();
    assert_eq!(err.code, Code::DaemonUnreachable);

    // A socket whose daemon is dead.
    let dead = dir.path().join("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let err = Client::new(dead).unwrap().server().await.unwrap_err();
    assert_eq!(err.code, Code::DaemonUnreachable);

    let long = PathBuf::from(format!("/{}", "x".repeat(200)));
    let err = Client::new(long).unwrap().server().await.unwrap_err();
    assert_eq!(err.code, Code::DaemonUnreachable);

    let closed = dir.path().join("closed");
    let _listener = std::os::unix::net::UnixListener::bind(&closed).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o000)).unwrap();
    if std::os::unix::net::UnixStream::connect(&closed).is_ok() {
        eprintln!("SKIPPED: permission of a socket: root may connect to any");
        return;
    }
    let err = Client::new(closed).unwrap().server().await.unwrap_err();
    assert_eq!(err.code, Code::PermissionDenied);
}

#[tokio::test]
async fn error_replies_arrive_whole_and_nonsense_is_ours() {
    let refuse = || async {
        let error = Error::new(Code::NoSpace, "The disk is full")
            .advise("Make room.")
            .detail("1 byte left");
        let error = error.into();
        (StatusCode::INSUFFICIENT_STORAGE, Json(ErrorReply { error }))
    };
    let router = Router::new()
        .route("/v1/instances", get(refuse))
        .route("/v1/server", get(async || "not JSON"))
        .route("/v1/catalog", get(async || StatusCode::IM_A_TEAPOT));
    let (client, _dir) = serve(router).await;
    let err = client.instances().await.unwrap_err();
    assert_eq!(err.code, Code::NoSpace);
    assert_eq!(err.message, "The disk is full");
    assert_eq!(err.advice.as_deref(), Some("Make room."));
    assert_eq!(err.details, ["1 byte left"]);
    assert_eq!(client.server().await.unwrap_err().code, Code::Internal);
    assert_eq!(client.catalog().await.unwrap_err().code, Code::Internal);
}

fn sse(events: &[OperationEvent]) -> impl IntoResponse + use<> {
    let data = |event| format!("data: {}\n\n", serde_json::to_string(event).unwrap());
    let text: String = events.iter().map(data).collect();
    (
        [(CONTENT_TYPE, "text/event-stream")],
        format!(": hi\n\n{text}"),
    )
}

#[tokio::test]
async fn an_operation_is_followed_to_its_end() {
    let router = Router::new().route(
        "/v1/operations/{id}/events",
        get(async || {
            let phase = Phase::Booting;
            let mut done = operation("failed");
            done.error = Some(Error::new(Code::BootTimeout, "too slow").into());
            let operation = Box::new(done);
            sse(&[
                OperationEvent::Phase { phase },
                OperationEvent::Done { operation },
            ])
        }),
    );
    let (client, _dir) = serve(router).await;
    let mut seen = 0;
    let done = client.follow(operation("running"), |_| seen += 1).await;
    let done = done.unwrap();
    assert_eq!((seen, done.state), (2, OperationState::Failed));
    assert_eq!(into_result(done).unwrap_err().code, Code::BootTimeout);
    // One that is over already needs no stream.
    let done = client.follow(operation("succeeded"), |_| ()).await.unwrap();
    assert!(into_result(done).is_ok());
}

#[tokio::test]
async fn a_stream_that_breaks_is_not_the_end_of_the_operation() {
    let polls = Arc::new(AtomicUsize::new(0));
    let counted = polls.clone();
    let router = Router::new()
        .route(
            "/v1/operations/{id}/events",
            get(async || {
                let phase = Phase::Booting;
                sse(&[OperationEvent::Phase { phase }])
            }),
        )
        .route(
            "/v1/operations/{id}/wait",
            get(async move || {
                let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
                Json(operation(if first { "running" } else { "succeeded" }))
            }),
        );
    let (client, _dir) = serve(router).await;
    let done = client.follow(operation("running"), |_| ()).await.unwrap();
    assert_eq!(done.state, OperationState::Succeeded);
    assert_eq!(polls.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_restarted_daemon_tells_how_the_operation_ended() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let first = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let path = socket.clone();
    // Answers with the head of a stream and dies.
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = first.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n: hi\n\n";
        stream.write_all(head.as_bytes()).unwrap();
        std::fs::remove_file(path).unwrap();
    });
    let client = Client::new(&socket).unwrap();
    let follow = client.follow(operation("running"), |_| ());
    let restart = async {
        while socket.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let wait = get(async || {
            let mut ended = operation("failed");
            ended.error = Some(Error::new(Code::Interrupted, "The daemon ended").into());
            Json(ended)
        });
        let router = Router::new().route("/v1/operations/{id}/wait", wait);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
    };
    let (done, ()) = tokio::join!(follow, restart);
    let err = into_result(done.unwrap()).unwrap_err();
    assert_eq!(err.code, Code::Interrupted);
}

#[tokio::test]
async fn events_and_logs_are_streams() {
    let router = Router::new()
        .route(
            "/v1/events",
            get(async || {
                let text =
                    "data: {\"type\":\"images\"}\n\ndata: {\"type\":\"lagged\",\"missed\":3}\n\n";
                ([(CONTENT_TYPE, "text/event-stream")], text)
            }),
        )
        .route("/v1/instances/{name}/log", get(async || "line\n"));
    let (client, _dir) = serve(router).await;
    let events: Vec<_> = client.events().await.unwrap().collect().await;
    let events: Vec<Event> = events.into_iter().map(Result::unwrap).collect();
    assert_eq!(events, [Event::Images, Event::Lagged { missed: 3 }]);
    let log = client.log("foo", &LogQuery::default()).await.unwrap();
    let parts: Vec<_> = log.collect().await;
    let bytes: Vec<u8> = parts.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(bytes, b"line\n");
}

#[tokio::test]
async fn a_session_talks_both_ways_and_its_break_is_an_error() {
    let router = Router::new()
        .route(
            "/v1/instances/foo/exec",
            get(async |upgrade: WebSocketUpgrade| {
                upgrade.on_upgrade(async |mut socket| {
                    while let Some(Ok(message)) = socket.recv().await {
                        let reply = match message {
                            Message::Text(text) if text.contains("start") => {
                                Message::text("{\"type\":\"started\"}")
                            }
                            Message::Binary(bytes) => {
                                Message::Binary([b"\x02", &bytes[..]].concat().into())
                            }
                            // The end without an end.
                            _ => return,
                        };
                        let _ = socket.send(reply).await;
                    }
                })
            }),
        )
        .route(
            "/v1/instances/bar/exec",
            get(async || {
                let error = Error::new(Code::WrongState, "It is stopped").into();
                (StatusCode::CONFLICT, Json(ErrorReply { error }))
            }),
        );
    let (client, _dir) = serve(router).await;
    let (mut input, mut output) = client.exec("foo", ExecRequest::default()).await.unwrap();
    let started = ExecPart::Event(ExecEvent::Started);
    assert_eq!(output.next().await.unwrap(), started);
    input.stdin("hello".into()).await.unwrap();
    let echo = ExecPart::Stderr("hello".into());
    assert_eq!(output.next().await.unwrap(), echo);
    input.eof().await.unwrap();
    assert_eq!(output.next().await.unwrap_err().code, Code::ExecFailed);

    let err = client
        .exec("bar", ExecRequest::default())
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::WrongState);
    let err = client
        .exec("../x", ExecRequest::default())
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::InstanceNotFound);
}

#[tokio::test]
async fn a_port_ends_by_direction() {
    let router = Router::new()
        .route(
            "/v1/instances/foo/port",
            get(async |uri: axum::http::Uri, upgrade: WebSocketUpgrade| {
                let query = uri.query().unwrap_or_default().to_owned();
                upgrade.on_upgrade(async move |mut socket| {
                    let mut all = Vec::from(query);
                    while let Some(Ok(Message::Binary(bytes))) = socket.recv().await {
                        if bytes.is_empty() {
                            break;
                        }
                        all.extend_from_slice(&bytes);
                    }
                    for bytes in [all.into(), "".into()] {
                        socket.send(Message::Binary(bytes)).await.unwrap();
                    }
                })
            }),
        )
        .route(
            "/v1/instances/bar/port",
            get(async || {
                let error = Error::new(Code::GuestUnreachable, "Nothing listens").into();
                (StatusCode::BAD_GATEWAY, Json(ErrorReply { error }))
            }),
        );
    let (client, _dir) = serve(router).await;
    let (mut input, mut output) = client.port("foo", 80).await.unwrap();
    // No bytes are not the end.
    input.send("".into()).await.unwrap();
    input.send("+a".into()).await.unwrap();
    input.send("b".into()).await.unwrap();
    input.end().await.unwrap();
    assert_eq!(output.next().await.unwrap().unwrap(), "port=80+ab");
    assert_eq!(output.next().await.unwrap(), None);
    // Beyond the end there is only the break.
    assert!(output.next().await.is_err());
    let err = client.port("bar", 80).await.unwrap_err();
    assert_eq!(err.code, Code::GuestUnreachable);
    assert!(client.port("a/b", 80).await.is_err());
}

#[tokio::test]
async fn settings_templates_and_leases_are_asked_for_by_name() {
    let setting = |value: &str| {
        Json(serde_json::json!({"key": "local.warm", "value": value, "values": "on or off"}))
    };
    let router = Router::new()
        .route(
            "/v1/settings/{key}",
            get(async move || setting("on")).put(async move |body: Json<serde_json::Value>| {
                assert_eq!(*body, serde_json::json!({"value": "off"}));
                setting("off")
            }),
        )
        .route(
            "/v1/templates/prune",
            axum::routing::post(async |uri: axum::http::Uri| {
                let all = uri.query() == Some("all=true");
                Json(serde_json::json!([{"id": "x", "freed": if all { 2 } else { 1 }}]))
            }),
        )
        .route(
            "/v1/instances/foo/lease",
            axum::routing::post(async |body: Json<serde_json::Value>| {
                assert_eq!(*body, serde_json::json!({"seconds": 30}));
                StatusCode::OK
            }),
        );
    let (client, _dir) = serve(router).await;
    assert_eq!(client.setting("local.warm").await.unwrap().value, "on");
    assert_eq!(client.set("local.warm", "off").await.unwrap().value, "off");
    let pruned = client.prune_templates(true).await.unwrap();
    assert_eq!(pruned[0].freed.bytes(), 2);
    client.lease("foo", 30).await.unwrap();
    let err = client.lease("../x", 30).await.unwrap_err();
    assert_eq!(err.code, Code::InstanceNotFound);
}

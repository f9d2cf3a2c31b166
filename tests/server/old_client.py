"""A program for OpenAI's first API, with the last client that spoke it (openai 0.28).

Run by test_old_client.py in a process of its own, as another openai is installed beside it. Prints
what it got as JSON: {name of the call: answer}.
"""

import base64
import io
import json
import sys

import openai
import requests

TEXT = "The weather is nice today. We will walk along the river."


def main(base_url: str) -> None:
    openai.api_key = "sk-111111111111111111111111111111111111111111111111"
    openai.api_base = base_url
    results = {name: call() for name, call in CALLS.items()}
    print(json.dumps({"version": openai.__version__, **results}))


def list_models():
    return openai.Model.list()


def get_model():
    return openai.Model.retrieve("org/any")


def list_engines():
    return openai.Engine.list()


def get_engine():
    return openai.Engine.retrieve("SmolLM2-135M-Instruct")


def generate():
    engine = openai.Engine("SmolLM2-135M-Instruct")
    return engine.generate(context="The capital of France is", length=5)


def complete():
    return openai.Completion.create(model="any", prompt="The capital of France is", max_tokens=5)


def complete_by_engine():
    return openai.Completion.create(engine="any", prompt="The capital of France is", max_tokens=5)


def chat():
    messages = [{"role": "user", "content": "Hello!"}]
    return openai.ChatCompletion.create(model="gpt-3.5-turbo", messages=messages, max_tokens=5)


def chat_streamed():
    messages = [{"role": "user", "content": "Hello!"}]
    chunks = openai.ChatCompletion.create(
        model="gpt-3.5-turbo", messages=messages, max_tokens=5, stream=True
    )
    return list(chunks)


def embed():
    texts = ["The cat sits outside.", "A kitten is in the garden."]
    return openai.Embedding.create(model="text-embedding-ada-002", input=texts)


def embed_by_engine():
    return openai.Engine("any").embeddings(input="The cat sits outside.")


def search():
    """As `Engine.search` of still older clients, which this one has no more."""
    engine = openai.Engine("davinci")
    params = {"documents": ["White House", "hospital", "school"], "query": "the president"}
    return engine.request("post", f"{engine.instance_url()}/search", params)


def moderate():
    return openai.Moderation.create(["I will kill you.", "What a lovely day."])


def make_images():
    """Words → an image → an edit of it, and one like it; each as the bytes of a file."""
    options = {"size": "64x64", "response_format": "b64_json"}
    images = [openai.Image.create(prompt="A lighthouse", n=2, **options)]
    image = base64.b64decode(images[0]["data"][0]["b64_json"])
    images.append(openai.Image.create_edit(image=image, prompt="In a storm", **options))
    images.append(openai.Image.create_variation(image=image, **options))
    return images


def speak_and_hear():
    """This client does not know speech: it asks as any program would."""
    body = {"model": "tts-1", "voice": "alloy", "input": TEXT}
    answer = requests.post(f"{openai.api_base}/audio/speech", json=body, timeout=100)
    answer.raise_for_status()

    def recording():
        file = io.BytesIO(answer.content)
        file.name = "speech.mp3"
        return file

    return {
        "transcript": openai.Audio.transcribe("whisper-1", recording()),
        "translation": openai.Audio.translate("whisper-1", recording()),
        "vtt": openai.Audio.transcribe("whisper-1", recording(), response_format="vtt"),
    }


def edit():
    try:
        openai.Edit.create(model="any", instruction="Correct it.", input="teh")
    except openai.error.OpenAIError as error:
        return {"status": error.http_status, "message": str(error)}
    return None


def keep_file():
    file = openai.File.create(
        file=b'{"text": "kept"}', purpose="fine-tune", user_provided_filename="kept.jsonl"
    )
    listed = openai.File.list()
    content = openai.File.download(file.id).decode()
    deleted = openai.File.delete(file.id)
    return {"created": file, "listed": listed, "content": content, "deleted": deleted}


def fine_tune():
    try:
        openai.FineTune.create(training_file="file-1")
    except openai.error.OpenAIError as error:
        return {"status": error.http_status, "message": str(error)}
    return None


CALLS = {
    "Model.list": list_models,
    "Model.retrieve": get_model,
    "Engine.list": list_engines,
    "Engine.retrieve": get_engine,
    "Engine.generate": generate,
    "Completion.create": complete,
    "Completion.create(engine)": complete_by_engine,
    "ChatCompletion.create": chat,
    "ChatCompletion.create(stream)": chat_streamed,
    "Embedding.create": embed,
    "Engine.embeddings": embed_by_engine,
    "search": search,
    "Moderation.create": moderate,
    "Image": make_images,
    "Audio": speak_and_hear,
    "Edit.create": edit,
    "File": keep_file,
    "FineTune.create": fine_tune,
}


if __name__ == "__main__":
    main(sys.argv[1])

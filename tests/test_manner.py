"""Kindness in Korean, on sentences that the classifier has not seen: their polite endings are the same."""

import json
from pathlib import Path

WARM = [
    "많이 당황스러우셨겠어요. 카드 정지부터 함께 해 보겠습니다.",
    "처음 겪는 소송이라 막막하시죠. 순서대로 쉽게 말씀드릴게요.",
    "불편을 끼쳐 드려 진심으로 사과드립니다.",
    "언제든 궁금한 게 생기면 부담 갖지 말고 연락 주세요.",
    "그런 일을 당하셔서 얼마나 분하셨을지 헤아려집니다.",
    "조급해하지 않으셔도 괜찮아요, 기한은 아직 넉넉합니다.",
    "믿고 맡겨 주셔서 고맙습니다, 끝까지 곁에서 챙길게요.",
    "어머님 병간호까지 하시느라 정말 힘드셨겠어요.",
    "실수는 누구나 하니 너무 속상해하지 마세요.",
    "설명이 어려우셨다면 죄송해요, 더 쉽게 다시 적어 볼게요.",
    "용기 내어 말씀해 주셔서 감사드립니다.",
    "잘하고 계시니 조금만 더 힘내 보아요.",
    "주문이 사라져서 놀라셨지요? 다행히 저희 쪽에 기록이 남아 있어요.",
    "걱정이 크시겠지만 대부분은 금방 좋아지니 안심하셔도 돼요.",
    "외로우실 때 이야기 나눌 수 있는 곳도 함께 찾아 드릴게요.",
]
COLD = [
    "여권은 구청 민원실에서 신청하세요.",
    "반품은 받은 날부터 이레 안에 접수하세요.",
    "요금은 월말에 한꺼번에 청구돼요.",
    "본인 확인을 위해 생년월일을 적어 주세요.",
    "계약서 두 번째 쪽에 서명하세요.",
    "글자를 크게 하려면 보기 메뉴를 여세요.",
    "이 쿠폰은 다른 할인과 함께 쓸 수 없어요.",
    "그건 알아서 하세요.",
    "바쁘니까 용건만 말하세요.",
    "안내문에 다 쓰여 있는데 왜 전화하셨어요?",
    "환불은 안 되니 더 묻지 마세요.",
    "그쪽 사정이니 저희와 상관없어요.",
    "주차장은 건물 뒤편에 있어요.",
    "임대인은 수선 의무를 집니다.",
    "항소는 판결문을 받은 날부터 14일 안에 해야 해요.",
]


def test_polite_endings_alone_are_not_kind() -> None:
    import evaluate

    folder = Path("tasks/metrics/manner")
    known = {
        json.loads(line)["text"] for line in (folder / "sentences.ko.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert not known & {*WARM, *COLD}
    said = [*WARM, *COLD]
    found = evaluate.load(f"./{folder}").compute(predictions=said, references=[""] * len(said))["kindness"]
    assert sum(value > 0.5 for value in found[:15]) >= 13
    assert sum(value < 0.5 for value in found[15:]) >= 13
